-- migrate:up

-- What is wrong with the topic filter of a rule, or null. As before, with the same message for double braces as in a policy file.
create or replace function topic_filter_fault(filter text) returns text
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp as $$
declare
  shape text; -- the filter with every known placeholder replaced by a letter
  brace text;
  levels text[];
  level text;
begin
  if filter is null or filter = '' then
    return 'it is empty; write "#" for every topic';
  elsif octet_length(filter) > 1024 then
    return format('it has %s bytes; at most 1024 are possible', octet_length(filter));
  end if;
  shape := regexp_replace(filter, '\{(device_id|client_id|device_type|vhost|attr\.[A-Za-z_][A-Za-z0-9_-]{0,62})\}', 'x', 'g');
  if shape ~ '[{}]' then
    if filter ~ '\{\{|\}\}' then
      return 'double braces are another product''s; placeholders are written {device_id}';
    end if;
    brace := substring(shape from '\{[^{}]*\}');
    if brace is null then
      return 'a brace is unbalanced; placeholders are written {device_id}';
    elsif brace = '{}' then
      return 'the placeholder {} is empty';
    end if;
    return format('the placeholder %s is unknown; there are {device_id}, {client_id}, {device_type}, {vhost} and {attr.NAME}', brace);
  end if;
  if position('*' in shape) > 0 then
    return '"*" is not possible in a rule; a level "+" is any one level, a final level "#" any number of levels';
  end if;
  levels := string_to_array(shape, '/');
  foreach level in array levels loop
    if level not in ('+', '#') and level ~ '[+#]' then
      return format('"+" and "#" are wildcards only as a whole level, not inside %s', level);
    end if;
  end loop;
  if array_position(levels, '#') < array_length(levels, 1) then
    return '"#" is possible only as the last level';
  end if;
  return null;
end $$;

-- migrate:down
