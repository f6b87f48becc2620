-- migrate:up

-- The registry: device types, devices, accounts and their topic rules. Constraints refuse an invalid row no matter how
-- it is written (psql, COPY, the API, a policy file), with a message that says what is wrong.

-- Every function below has pg_temp at the end of its search path: otherwise PostgreSQL would search it first, and a role
-- could substitute its own types in a function that runs with the owner's rights.

-- Raises a check violation with this message. Unlike a plain CHECK it prints no "Failing row contains (...)", which would
-- put password hashes into error messages and server logs. (A refused COPY still shows its line as CONTEXT.)
create function refuse(fault text) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  raise exception using errcode = 'check_violation', message = fault;
end $$;

-- What is wrong with an MQTT topic filter of a rule, or null.
create function topic_filter_fault(filter text) returns text
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

-- What is wrong with a client id pattern of a device type, or null.
create function client_id_pattern_fault(pattern text) returns text
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp as $$
begin
  if pattern ~ '^\{device_id\}([_./-]([A-Za-z0-9_.:@/-]*[_./-])?\*|[_./-][A-Za-z0-9_.:@/-]+)?$' and octet_length(pattern) <= 128 then
    return null;
  elsif pattern is null or left(pattern, 11) <> '{device_id}' then
    return 'it must begin with {device_id}, else devices could share client ids';
  elsif pattern ~ '\*.' then
    return '"*" is possible only at the end';
  elsif pattern ~ '^\{device_id\}.*[^_./-]\*$' then
    return '"*" is possible only straight after a separator (_ - . /)';
  elsif pattern ~ '^\{device_id\}[^_./-]' then
    return 'after {device_id} comes a separator (_ - . /), else APM1 would fit the devices APM1 and APM10';
  end if;
  return 'it must be {device_id}, optionally followed by a separator (_ - . /), text of A-Z a-z 0-9 _ . : @ / - and a final * straight after a separator';
end $$;

-- Whether a client id fits a device's patterns; ownership among several devices is decided by the longest device id.
create function client_id_fits(client_id text, device_id text, patterns text[]) returns boolean
language sql immutable parallel safe set search_path = pg_catalog, pg_temp as $$
  select coalesce(bool_or(
    case when right(full_pattern, 1) = '*'
      then length(client_id) >= length(full_pattern) and starts_with(client_id, left(full_pattern, -1))
      else client_id = full_pattern end), false)
  from (select device_id || substr(pattern, 12) as full_pattern from unnest(patterns) as pattern) as p
$$;

-- The device ids that a client id could belong to: every prefix that ends before a separator, and the whole.
create function client_id_owners(client_id text) returns setof text
language sql immutable parallel safe set search_path = pg_catalog, pg_temp as $$
  select left(client_id, n) from generate_series(1, least(length(client_id), 64)) as n
  where n = length(client_id) or substr(client_id, n + 1, 1) in ('_', '-', '.', '/')
$$;

-- What is wrong with a name that RabbitMQ takes from a certificate or from a client, or null.
create function common_name_fault(name text) returns text
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp as $$
begin
  if name is null or name = '' then
    return 'it is empty';
  elsif octet_length(name) > 128 then
    return format('it has %s bytes; at most 128 are possible', octet_length(name));
  elsif position(',' in name) > 0 then
    return '"," is not possible: RabbitMQ joins several common names of one certificate with it';
  elsif position(':' in name) > 0 then
    return '":" is not possible: RabbitMQ splits "vhost:user" at it';
  elsif name ~ E'[\u0001-\u001f\u007f-\u009f\u2028\u2029]' then
    return 'a control character is not possible';
  elsif name ~ E'^[ \u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]|[ \u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]$' then -- \s would depend on the locale
    return 'white space at an end is not possible';
  end if;
  return null;
end $$;

create function name_list_fault(names text[], longest_bytes integer) returns text
language sql immutable parallel safe set search_path = pg_catalog, pg_temp as $$
  select case
    when names is null then 'the list is null; write {} for none'
    when coalesce(array_ndims(names), 1) <> 1 then 'the list has more than one dimension'
    when array_position(names, null) is not null then 'an entry is null'
    when array_position(names, '') is not null then 'an entry is empty'
    when exists (select from unnest(names) as n where octet_length(n) > longest_bytes) then format('an entry is longer than %s bytes', longest_bytes)
    when exists (select from unnest(names) as n group by n having count(*) > 1) then 'an entry is there twice'
  end
$$;

create function networks_fault(networks cidr[]) returns text
language sql immutable parallel safe set search_path = pg_catalog, pg_temp as $$
  select case
    when networks is null then null
    when coalesce(array_ndims(networks), 1) <> 1 then 'the list has more than one dimension'
    when cardinality(networks) = 0 then 'an empty list would fit no address; write null for any address'
    when array_position(networks, null) is not null then 'an entry is null'
  end
$$;

create function attributes_fault(attributes jsonb) returns text
language sql immutable parallel safe set search_path = pg_catalog, pg_temp as $$
  select case
    when attributes = '{}' then null
    when attributes is null or jsonb_typeof(attributes) <> 'object' then 'they must be a JSON object'
    else (select case
            when key !~ '^[A-Za-z_][A-Za-z0-9_-]{0,62}$' then format('the name %s is not possible; names are a letter or _, then letters, digits, _ and -', to_json(key))
            when jsonb_typeof(value) <> 'string' then format('the value of %s must be a string', to_json(key))
            else format('the value of %s has more than 1024 bytes', to_json(key)) end
          from jsonb_each(attributes)
          where key !~ '^[A-Za-z_][A-Za-z0-9_-]{0,62}$' or jsonb_typeof(value) <> 'string' or octet_length(value #>> '{}') > 1024
          limit 1)
  end
$$;

create table device_type (
  name text primary key,
  description text not null default '',
  client_ids text[] not null default '{}',
  vhosts text[] not null default '{}',
  networks cidr[], -- null: any address
  constraint device_type_name check (case when name ~ '^[A-Za-z][A-Za-z0-9_-]{0,62}$' then true else public.refuse(format('device type %L: a name is a letter, then at most 62 letters, digits, "_" and "-"', name)) end),
  constraint device_type_client_ids check (case when public.name_list_fault(client_ids, 128) is null then true else public.refuse(format('client ids of device type %L: %s', name, public.name_list_fault(client_ids, 128))) end),
  constraint device_type_vhosts check (case when public.name_list_fault(vhosts, 255) is null then true else public.refuse(format('vhosts of device type %L: %s', name, public.name_list_fault(vhosts, 255))) end),
  constraint device_type_networks check (case when public.networks_fault(networks) is null then true else public.refuse(format('networks of device type %L: %s', name, public.networks_fault(networks))) end)
);

create function device_type_client_id_patterns() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  pattern text;
begin
  foreach pattern in array coalesce(new.client_ids, '{}') loop
    if octet_length(pattern) <= 128 and public.client_id_pattern_fault(pattern) is not null then -- else the table's own checks name the fault
      perform public.refuse(format('client id pattern %L of device type %L: %s', pattern, new.name, public.client_id_pattern_fault(pattern)));
    end if;
  end loop;
  return new;
end $$;
create trigger client_id_patterns before insert or update on device_type for each row execute function device_type_client_id_patterns();

create table device (
  device_id text primary key,
  common_name text not null unique deferrable, -- checked at the end of a statement, so that names can change hands
  type text not null references device_type (name) on update cascade,
  status text not null default 'active',
  status_reason text not null default '',
  status_changed_at timestamptz not null default now(),
  attributes jsonb not null default '{}',
  expires_at timestamptz, -- null: never
  constraint device_id_form check (case when device_id ~ '^[A-Za-z0-9_-]{1,64}$' then true else public.refuse(format('device id %L: 1 to 64 letters, digits, "_" and "-" are possible, nothing else', device_id)) end),
  constraint device_common_name check (case when common_name = device_id then true when public.common_name_fault(common_name) is null then true else public.refuse(format('common name %L of device %L: %s', common_name, device_id, public.common_name_fault(common_name))) end),
  constraint device_status check (case when status in ('pending', 'active', 'suspended', 'revoked') then true else public.refuse(format('status %L of device %L: possible are pending, active, suspended and revoked', status, device_id)) end),
  constraint device_attributes check (case when public.attributes_fault(attributes) is null then true else public.refuse(format('attributes of device %L: %s', device_id, public.attributes_fault(attributes))) end),
  constraint device_expires_at check (case when expires_at is null or (expires_at >= '1970-01-01Z' and expires_at < '9999-12-31Z') then true else public.refuse(format('expiry of device %L: possible are the years 1970 to 9999; null is never', device_id)) end),
  constraint device_status_changed_at check (case when status_changed_at >= '1970-01-01Z' and status_changed_at < '9999-12-31Z' then true else public.refuse(format('time of the status of device %L: possible are the years 1970 to 9999', device_id)) end)
);
create index device_type_of on device (type);

create function device_defaults() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  new.common_name := coalesce(new.common_name, new.device_id);
  return new;
end $$;
create trigger defaults before insert on device for each row when (new.common_name is null) execute function device_defaults();

create function device_status_changed() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  new.status_changed_at := now();
  return new;
end $$;
create trigger status_changed before update on device for each row when (old.status is distinct from new.status) execute function device_status_changed();

create table account (
  name text primary key,
  login text not null,
  password_hash text, -- argon2id in PHC form
  tags text[] not null default '{}',
  vhosts text[] not null default '{}',
  networks cidr[], -- null: any address
  client_ids text[] not null default '{}',
  configure text[] not null default '{}',
  write text[] not null default '{}',
  read text[] not null default '{}',
  unchecked_dead_lettering boolean not null default false
);

create table topic_rule (
  id bigint generated by default as identity primary key,
  device_type text references device_type (name) on update cascade on delete cascade,
  device_id text references device (device_id) on update cascade on delete cascade,
  account text references account (name) on update cascade on delete cascade,
  effect text not null,
  action text not null,
  topic text not null,
  exchange text, -- accounts only; null: the MQTT exchange
  note text not null default '',
  constraint topic_rule_owner check (case when num_nonnulls(device_type, device_id, account) = 1 then true else public.refuse('a topic rule belongs to exactly one device type, device or account') end),
  constraint topic_rule_effect check (case when effect in ('allow', 'deny') then true else public.refuse(format('effect %L: possible are allow and deny', effect)) end),
  constraint topic_rule_action check (case when action in ('publish', 'subscribe') then true else public.refuse(format('action %L: possible are publish and subscribe', action)) end),
  constraint topic_rule_topic check (case when public.topic_filter_fault(topic) is null then true else public.refuse(format('topic filter %L: %s', topic, public.topic_filter_fault(topic))) end),
  constraint topic_rule_exchange check (case when exchange is null or (account is not null and exchange <> '' and octet_length(exchange) <= 255) then true else public.refuse(format('exchange %L: only the rule of an account can name one, with 1 to 255 bytes', exchange)) end),
  constraint topic_rule_once unique nulls not distinct (device_type, device_id, account, effect, action, topic, exchange)
);
create index topic_rule_device_id on topic_rule (device_id) where device_id is not null;
create index topic_rule_account on topic_rule (account) where account is not null;

-- Whether a resource permission of an account ("*" stands for any run of characters) reaches a name.
create function resource_pattern_matches(pattern text, name text) returns boolean
language sql immutable parallel safe set search_path = pg_catalog, pg_temp as $$
  select name like replace(replace(replace(replace(pattern, '\', '\\'), '%', '\%'), '_', '\_'), '*', '%')
$$;

-- What is wrong with an account's own columns, or null. Never prints the hash.
create function account_fault(a account) returns text
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
declare
  tag text;
  client_id text;
  cost text[];
begin
  if public.common_name_fault(a.name) is not null then
    return public.common_name_fault(a.name);
  elsif a.login is null or a.login not in ('password', 'certificate') then
    return 'login must be password or certificate';
  elsif a.unchecked_dead_lettering is null then
    return 'unchecked_dead_lettering must be true or false';
  elsif a.password_hash is not null then
    if a.login <> 'password' then
      return 'an account that logs in by certificate has no password';
    end if;
    cost := regexp_match(a.password_hash, '^\$argon2id\$v=19\$m=(\d{1,6}),t=(\d{1,2}),p=(\d{1,2})\$[A-Za-z0-9+/]{11,86}\$[A-Za-z0-9+/]{22,86}$');
    if cost is null then
      return 'the password hash is not argon2id in PHC form ($argon2id$v=19$m=...,t=...,p=...$salt$hash); set it with: authbackend account passwd';
    elsif cost[1]::int not between 8 and 262144 or cost[2]::int not between 1 and 16 or cost[3]::int not between 1 and 16 then
      return 'the password hash costs too much: at most m=262144 (KiB), t=16, p=16';
    end if;
  end if;
  if public.name_list_fault(a.tags, 255) is not null then
    return 'tags: ' || public.name_list_fault(a.tags, 255);
  end if;
  foreach tag in array a.tags loop
    if tag not in ('administrator', 'monitoring', 'policymaker', 'management', 'impersonator') then
      return format('tag %L is not one of RabbitMQ''s: administrator, monitoring, policymaker, management, impersonator', tag);
    end if;
  end loop;
  if public.name_list_fault(a.vhosts, 255) is not null then
    return 'vhosts: ' || public.name_list_fault(a.vhosts, 255);
  elsif public.networks_fault(a.networks) is not null then
    return 'networks: ' || public.networks_fault(a.networks);
  elsif public.name_list_fault(a.client_ids, 255) is not null then
    return 'client ids: ' || public.name_list_fault(a.client_ids, 255);
  elsif public.name_list_fault(a.configure, 255) is not null then
    return 'configure: ' || public.name_list_fault(a.configure, 255);
  elsif public.name_list_fault(a.write, 255) is not null then
    return 'write: ' || public.name_list_fault(a.write, 255);
  elsif public.name_list_fault(a.read, 255) is not null then
    return 'read: ' || public.name_list_fault(a.read, 255);
  end if;
  foreach client_id in array a.client_ids loop
    if client_id ~ E'[*#+{}\u0001-\u001f\u007f-\u009f]' then
      return format('client id %L: an account lists exact client ids, without wildcards or control characters', client_id);
    end if;
  end loop;
  return null;
end $$;

create function account_check() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  if public.account_fault(new) is not null then
    perform public.refuse(format('account %L: %s', new.name, public.account_fault(new)));
  end if;
  return new;
end $$;
create trigger account_check before insert or update on account for each row execute function account_check();

-- Checks across tables are serialised by locking one row: statements on devices share the lock; those on types, accounts
-- and accounts' rules take it exclusively, so that none checks against rows it cannot see.
create table identity_guard (one boolean primary key default true check (one), writers bigint not null default 0);
insert into identity_guard default values;

create function identity_guard_take() returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  if current_setting('transaction_isolation') <> 'read committed' then
    raise exception using errcode = 'feature_not_supported', message = 'device types, accounts and their rules can be changed only in a READ COMMITTED transaction: the check must see what others committed';
  end if;
  update public.identity_guard set writers = writers + 1;
end $$;

-- RabbitMQ does not check the routing key when it dead-letters: an account that may configure queues and write to a topic
-- exchange could bypass every topic rule.
create function account_dead_lettering_check() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  touched text[];
  found_account text;
  found_exchange text;
begin
  if tg_table_name = 'account' then
    select array_agg(name) into touched from new_rows;
  else
    select array_agg(distinct account) into touched from new_rows where account is not null;
  end if;
  if touched is null then
    return null;
  end if;
  perform public.identity_guard_take();
  select a.name, x.name into found_account, found_exchange
  from public.account a
  cross join lateral (select 'amq.topic' as name union select r.exchange from public.topic_rule r where r.account = a.name and r.exchange is not null) as x
  where a.name = any (touched) and not a.unchecked_dead_lettering and cardinality(a.configure) > 0
    and exists (select from unnest(a.write) as w where public.resource_pattern_matches(w, x.name))
  limit 1;
  if found then
    perform public.refuse(format('account %L may configure queues and write to the topic exchange %L: by dead-lettering it could publish to any topic, because RabbitMQ does not check the dead-letter routing key. Narrow configure or write, or set unchecked_dead_lettering to true', found_account, found_exchange));
  end if;
  return null;
end $$;
create trigger dead_lettering_i after insert on account referencing new table as new_rows for each statement execute function account_dead_lettering_check();
create trigger dead_lettering_u after update on account referencing new table as new_rows for each statement execute function account_dead_lettering_check();
create trigger dead_lettering_i after insert on topic_rule referencing new table as new_rows for each statement execute function account_dead_lettering_check();
create trigger dead_lettering_u after update on topic_rule referencing new table as new_rows for each statement execute function account_dead_lettering_check();

-- Who owns a name or a client id depends on devices, types and accounts together.
create function identity_check() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  fault text;
begin
  if tg_argv[0] = 'share' then
    perform from public.identity_guard for share;
  else
    perform public.identity_guard_take();
  end if;
  select f into fault from (
    select format('account %L has the common name of device %L', a.name, d.device_id) as f
    from public.account a join public.device d on d.common_name = a.name
    union all
    select format('account %L has the id of device %L', a.name, d.device_id)
    from public.account a join public.device d on d.device_id = a.name
    union all
    select format('client id %L of account %L belongs to device %L', c, a.name, d.device_id)
    from public.account a cross join unnest(a.client_ids) as c cross join lateral public.client_id_owners(c) as o
    join public.device d on d.device_id = o join public.device_type t on t.name = d.type
    where c = d.device_id or public.client_id_fits(c, d.device_id, t.client_ids)
  ) as faults limit 1;
  if fault is not null then
    perform public.refuse(fault);
  end if;
  return null;
end $$;
-- Not on a change of status: a revocation must not wait for a lock.
create trigger identity after insert or update of device_id, common_name, type on device for each statement execute function identity_check('share');
create trigger identity after insert or update on device_type for each statement execute function identity_check('alone');
create trigger identity after insert or update on account for each statement execute function identity_check('alone');

-- Also for sessions with session_replication_role = replica.
alter table device_type enable always trigger client_id_patterns, enable always trigger identity;
alter table device enable always trigger defaults, enable always trigger status_changed, enable always trigger identity;
alter table account enable always trigger account_check, enable always trigger dead_lettering_i, enable always trigger dead_lettering_u, enable always trigger identity;
alter table topic_rule enable always trigger dead_lettering_i, enable always trigger dead_lettering_u;

-- migrate:down
