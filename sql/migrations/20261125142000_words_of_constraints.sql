-- migrate:up

-- Constraints refuse rows with messages for people. Duplicates must be found by the index itself, or ON CONFLICT would not work,
-- so there the name of the constraint says what is wrong, with the key.
alter table device rename constraint device_pkey to device_id_is_taken;
alter table device rename constraint device_common_name_key to common_name_is_taken;
alter table device_type rename constraint device_type_pkey to device_type_exists;
alter table account rename constraint account_pkey to account_exists;
alter table topic_rule rename constraint topic_rule_once to topic_rule_exists;
alter table topic_rule rename constraint topic_rule_pkey to topic_rule_id_is_taken;
alter table certificate rename constraint certificate_pkey to certificate_is_on_record;
alter table certificate rename constraint certificate_issuer_serial to serial_number_of_issuer_is_on_record;
alter table authority rename constraint authority_pkey to authority_exists;
alter table authority rename constraint authority_subject_key to authority_with_this_subject_exists;
alter table crl rename constraint crl_pkey to authority_has_a_revocation_list;
alter table crl_listed rename constraint crl_listed_pkey to serial_number_is_listed;
alter table device_schedule rename constraint device_schedule_pkey to device_has_something_scheduled_then;
alter table brake rename constraint brake_pkey to brake_has_its_limits;

alter table brake drop constraint brake_one_check, drop constraint brake_devices_check, drop constraint brake_percent_check,
  add constraint brake_one check (case when one then true else public.refuse('the brake has one row of limits: leave the column "one" out') end),
  add constraint brake_devices check (case when devices >= 0 then true else public.refuse(format('limit of the brake: %s devices are not possible; 0 or more are', devices)) end),
  add constraint brake_percent check (case when percent between 0 and 100 then true else public.refuse(format('limit of the brake: %s percent are not possible; 0 to 100 are', percent)) end);

create or replace function attributes_fault(attributes jsonb) returns text
language sql immutable parallel safe set search_path = pg_catalog, pg_temp as $$
  select case
    when attributes = '{}' then null
    when attributes is null or jsonb_typeof(attributes) <> 'object' then 'they must be a JSON object, as {"site": "hamburg"}'
    else (select case
            when key !~ '^[A-Za-z_][A-Za-z0-9_-]{0,62}$' then format('the name %s is not possible; names are a letter or _, then letters, digits, _ and -', to_json(key))
            when jsonb_typeof(value) in ('number', 'boolean') then format('the value of %s must be a string: write {%s: %s}', to_json(key), to_json(key), to_json(value #>> '{}'))
            when jsonb_typeof(value) <> 'string' then format('the value of %s must be a string', to_json(key))
            else format('the value of %s has more than 1024 bytes', to_json(key)) end
          from jsonb_each(attributes)
          where key !~ '^[A-Za-z_][A-Za-z0-9_-]{0,62}$' or jsonb_typeof(value) <> 'string' or octet_length(value #>> '{}') > 1024
          limit 1)
  end
$$;

-- Refuses a null in a column that must have a value. Like refuse(), and unlike PostgreSQL itself, it does not print the row.
create function refuse_null() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  given constant jsonb := to_jsonb(new);
  missing record;
begin
  select a.attname, a.atthasdef or a.attidentity <> '' as has_default into missing from pg_attribute a
  where a.attrelid = tg_relid and a.attnotnull and a.attnum > 0 and not a.attisdropped and given -> a.attname = 'null'
  order by a.attnum limit 1;
  raise exception using errcode = 'not_null_violation', schema = tg_table_schema, table = tg_table_name, column = missing.attname,
    message = format('%s%s: %s is null', tg_table_name, coalesce(' ' || (given ->> tg_argv[0]), ''), missing.attname),
    hint = case when missing.has_default then format('Leave %s out of the statement to get its default.', missing.attname) else format('Every %s needs a value of %s.', tg_table_name, missing.attname) end;
end $$;

-- For each table that people write, the column that identifies a row in messages.
do $$
declare
  t record;
  trigger_name text;
begin
  for t in select * from (values ('device', 'device_id'), ('device_type', 'name'), ('account', 'name'), ('topic_rule', 'topic'), ('certificate', 'serial'),
                                 ('authority', 'name'), ('crl', 'authority'), ('crl_listed', 'serial'), ('device_schedule', 'device_id'), ('brake', 'one')) as v (name, called) loop
    -- That of crl comes before crl_check, which needs a number; that of device after the trigger that has the default of a name.
    trigger_name := case t.name when 'crl' then 'check_not_null' else 'not_null' end;
    execute format('create trigger %I before insert or update on %I for each row when (%s) execute function refuse_null(%L)', trigger_name, t.name,
      (select string_agg(format('new.%I is null', attname), ' or ' order by attnum) from pg_attribute
       where attrelid = t.name::regclass and attnotnull and attnum > 0 and not attisdropped), t.called);
    execute format('alter table %I enable always trigger %I', t.name, trigger_name);
  end loop;
end $$;

-- A foreign key does not say what to do when something is missing or still in use. These triggers do, and fire first: row triggers
-- fire in the order of their names, and those of foreign keys begin with RI_. The foreign key still decides; with one snapshot for
-- the whole transaction it decides alone, because it sees what others committed since, and these triggers do not.
create function refuse_reference(of_table text, of_column text, of_constraint text, fault text, advice text) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  if current_setting('transaction_isolation') in ('read committed', 'read uncommitted') then
    raise exception using errcode = 'foreign_key_violation', schema = 'public', table = of_table, column = of_column, constraint = of_constraint, message = fault, hint = advice;
  end if;
end $$;

create function names_known(kind text, names text[]) returns text
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select case when names is null then format('There is no %s yet.', kind)
    else format('There are: %s%s.', array_to_string(names[:10], ', '), case when cardinality(names) > 10 then ', …' else '' end) end
$$;

create function device_type_known() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  if not exists (select from public.device_type where name = new.type) then
    perform public.refuse_reference('device', 'type', 'device_type_fkey',
      format('type %L of device %L: there is no such device type', new.type, new.device_id),
      public.names_known('device type', (select array_agg(name) from (select name from public.device_type order by name limit 11) as t)) || ' A new one is added before its devices.');
  end if;
  return null;
end $$;
create trigger "KNOWN_I" after insert on device for each row execute function device_type_known();
create trigger "KNOWN_U" after update on device for each row when (new.type is distinct from old.type) execute function device_type_known();

create function device_type_in_use() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  names text[] := (select array_agg(device_id) from (select device_id from public.device where type = old.name order by device_id limit 4) as d);
begin
  if names is not null and not exists (select from public.device_type where name = old.name) then
    perform public.refuse_reference('device', 'type', 'device_type_fkey',
      format('device type %L still has devices: %s%s', old.name, array_to_string(names[:3], ', '), case when cardinality(names) > 3 then ', …' else '' end),
      'Move them to another type, or delete them, before the type.');
  end if;
  return null;
end $$;
create trigger "IN_USE" after delete on device_type for each row execute function device_type_in_use();

-- Nested IFs: one IF with both conditions would lock the second table even if only the first is needed.
create function topic_rule_owner_known() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  if new.device_type is not null then
    if not exists (select from public.device_type where name = new.device_type) then
      perform public.refuse_reference('topic_rule', 'device_type', 'topic_rule_device_type_fkey', format('rule for topic %L: there is no device type %L', new.topic, new.device_type),
        public.names_known('device type', (select array_agg(name) from (select name from public.device_type order by name limit 11) as t)));
    end if;
  elsif new.device_id is not null then
    if not exists (select from public.device where device_id = new.device_id) then
      perform public.refuse_reference('topic_rule', 'device_id', 'topic_rule_device_id_fkey', format('rule for topic %L: there is no device with the id %L', new.topic, new.device_id),
        'A rule names a device by its device_id, which may differ from its common name; the device is added before its rules.');
    end if;
  elsif not exists (select from public.account where name = new.account) then
    perform public.refuse_reference('topic_rule', 'account', 'topic_rule_account_fkey', format('rule for topic %L: there is no account %L', new.topic, new.account),
      'An account is added before its rules.');
  end if;
  return null;
end $$;
create trigger "KNOWN_I" after insert on topic_rule for each row execute function topic_rule_owner_known();
create trigger "KNOWN_U" after update on topic_rule for each row
  when (array[new.device_type, new.device_id, new.account] is distinct from array[old.device_type, old.device_id, old.account]) execute function topic_rule_owner_known();

create function device_id_known() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  if new.device_id is not null then
    if not exists (select from public.device where device_id = new.device_id) then
      perform public.refuse_reference(tg_table_name, 'device_id', tg_table_name || '_device_id_fkey', format('%s: there is no device with the id %L', tg_argv[0], new.device_id),
        'A device is named by its device_id, which may differ from its common name.');
    end if;
  end if;
  return null;
end $$;
-- Deferrable like the foreign key.
create constraint trigger "KNOWN" after insert or update of device_id on certificate deferrable initially immediate for each row execute function device_id_known('certificate');
create trigger "KNOWN" after insert or update of device_id on device_schedule for each row execute function device_id_known('schedule');

create function crl_authority_known() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  if not exists (select from public.authority where name = new.authority) then
    perform public.refuse_reference('crl', 'authority', 'crl_authority_fkey', format('revocation list: there is no authority %L', new.authority),
      public.names_known('authority', (select array_agg(name) from (select name from public.authority order by name limit 11) as t)));
  end if;
  return null;
end $$;
create trigger "KNOWN" after insert or update of authority on crl for each row execute function crl_authority_known();

alter table device enable always trigger "KNOWN_I", enable always trigger "KNOWN_U";
alter table device_type enable always trigger "IN_USE";
alter table topic_rule enable always trigger "KNOWN_I", enable always trigger "KNOWN_U";
alter table certificate enable always trigger "KNOWN";
alter table device_schedule enable always trigger "KNOWN";
alter table crl enable always trigger "KNOWN";
revoke execute on function device_type_known(), device_type_in_use(), topic_rule_owner_known(), device_id_known(), crl_authority_known() from public;

-- migrate:down
