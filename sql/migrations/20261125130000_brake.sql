-- migrate:up

-- The brake on mass change: one wrong UPDATE must not disconnect a fleet. A transaction that takes something from more devices
-- than `brake` allows is refused, whoever writes; accept_impact() lets an intended one through.

-- A transaction is refused only beyond both limits. Without a row they are 100 and 5. The owner sets them, with audit rows.
create table brake (
  one boolean primary key default true check (one),
  devices bigint not null default 100 check (devices >= 0),
  percent numeric not null default 5 check (percent between 0 and 100)
);
call audit_watch('brake', 'brake', 'one');

-- What each open transaction takes something from. Rows of ended transactions mean nothing, and later transactions delete them;
-- a crash may lose all rows.
create unlogged table brake_impact (
  version xid8 not null default pg_current_xact_id(),
  kind text not null, -- device, account or certificate, which are counted; device_type: its devices have been counted
  name text not null,
  cause text not null,
  primary key (version, kind, name)
);

create unlogged table brake_acceptance (
  version xid8 primary key default pg_current_xact_id(),
  accepted bigint -- null: for scheduled changes, which were counted when they were scheduled
);

-- Counts what a statement added to brake_impact, and refuses too much. The sum is kept in a setting, so that a transaction
-- of many statements does not count all rows each time.
create function brake_count(added bigint) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  mine text := pg_current_xact_id()::text;
  known text[] := string_to_array(current_setting('authbackend.impact', true), ':');
  touched bigint := added;
  registered bigint;
  allowed record;
begin
  if added = 0 then
    return;
  end if;
  if known[1] = mine then
    touched := touched + known[2]::bigint;
  end if;
  perform set_config('authbackend.impact', mine || ':' || touched, true);
  select coalesce(b.devices, 100) as devices, coalesce(b.percent, 5) as percent, a.version is not null and a.accepted is null as by_time, a.accepted into allowed
  from (values (true)) as always left join public.brake b on true left join public.brake_acceptance a on a.version = pg_current_xact_id();
  if touched <= allowed.devices or touched <= allowed.accepted or allowed.by_time then
    return;
  end if;
  registered := (select count(*) from public.device)
    + (select count(*) from public.brake_impact i where i.version = pg_current_xact_id() and i.kind = 'device'
       and not exists (select from public.device d where d.device_id = i.name));
  if touched <= registered * allowed.percent / 100 then
    return;
  end if;
  perform public.refuse(format(
    'this transaction would take something from %s devices, accounts or certificates, of %s devices: %s. More than %s and more than %s %% is refused unless it is meant: %s in the same transaction, or --accept-impact %s',
    touched, registered,
    (select string_agg(format('%s %s (%s)', n, cause, sample), ', ' order by n desc)
     from (select cause, count(*) as n, left(string_agg(name, ', ' order by name) filter (where place <= 3), 200) || case when count(*) > 3 then ', …' else '' end as sample
           from (select *, row_number() over (partition by cause order by name) as place from public.brake_impact
                 where version = pg_current_xact_id() and kind <> 'device_type') as i group by cause) as c),
    allowed.devices, allowed.percent, format('select accept_impact(%s)', touched), touched));
end $$;
revoke execute on function brake_count(bigint) from public;

-- Deletes rows of ended transactions. The first change of a transaction calls it, and deletes what an earlier incarnation of the
-- database may have left under its own transaction id.
create function brake_begin() returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  if split_part(current_setting('authbackend.impact', true), ':', 1) = pg_current_xact_id()::text then
    return;
  end if;
  delete from public.brake_impact where ctid in (
    select ctid from public.brake_impact
    where version < pg_snapshot_xmin(pg_current_snapshot()) or version >= pg_snapshot_xmax(pg_current_snapshot()) or version = pg_current_xact_id()
    limit 100000 for update skip locked);
  perform set_config('authbackend.impact', pg_current_xact_id()::text || ':0', true);
end $$;
revoke execute on function brake_begin() from public;

create function brake_device() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  n bigint;
begin
  perform public.brake_begin();
  if tg_op = 'DELETE' then
    insert into public.brake_impact (kind, name, cause) select 'device', o.device_id, 'deleted' from old_rows o on conflict do nothing;
  else
    insert into public.brake_impact (kind, name, cause)
    select 'device', o.device_id, c.cause
    from old_rows o left join new_rows n using (device_id)
    cross join lateral (select case
      when n.device_id is null then 'renamed'
      when n.status <> o.status and n.status <> 'active' then n.status
      when n.expires_at < coalesce(o.expires_at, 'infinity') then 'expiring sooner'
      -- A type that is gone was renamed, with its devices.
      when n.type <> o.type and exists (select from public.device_type t where t.name = o.type) then 'retyped'
      when n.common_name <> o.common_name then 'renamed'
      when n.attributes <> o.attributes and public.enforcement_attributes_used(n.device_id, n.type, o.attributes, n.attributes) then 'with other attributes'
      end as cause) as c
    where c.cause is not null on conflict do nothing;
  end if;
  get diagnostics n = row_count;
  perform public.brake_count(n);
  return null;
end $$;

-- All devices of types that are narrowed, once each in a transaction.
create function brake_types(types text[], cause text) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  n bigint;
begin
  if not exists (select from unnest(types) as x where x is not null) then
    return;
  end if;
  with fresh as (
    insert into public.brake_impact (kind, name, cause) select 'device_type', x, '' from unnest(types) as x where x is not null on conflict do nothing returning name)
  insert into public.brake_impact (kind, name, cause)
  select 'device', d.device_id, brake_types.cause from public.device d where d.type in (select name from fresh) on conflict do nothing;
  get diagnostics n = row_count;
  perform public.brake_count(n);
end $$;
revoke execute on function brake_types(text[], text) from public;

create function brake_device_type() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform public.brake_begin();
  perform public.brake_types(array_agg(n.name), 'of a type that is narrowed') from new_rows n join old_rows o using (name)
  where not (o.client_ids <@ n.client_ids and o.vhosts <@ n.vhosts)
     or (n.networks is not null and n.networks is distinct from o.networks)
     or n.max_staleness_s < o.max_staleness_s or (n.max_staleness_s is not null and o.max_staleness_s is null)
     or (n.require_known_certificate and not o.require_known_certificate);
  return null;
end $$;

create function brake_topic_rule() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  lost text := $q$select device_type, device_id, account, action, topic, exchange, 'allow' from old_rows where effect = 'allow'$q$;
  gained text := $q$select device_type, device_id, account, action, topic, exchange, 'deny' from new_rows where effect = 'deny'$q$;
  types text[];
  devices text[];
  accounts text[];
  n bigint;
begin
  perform public.brake_begin();
  execute format('select array_agg(distinct device_type), array_agg(distinct device_id), array_agg(distinct account) from (%s) as narrowed',
    case tg_op when 'INSERT' then gained when 'DELETE' then lost
      else format('(%s except all select device_type, device_id, account, action, topic, exchange, %L from new_rows where effect = %L) union all (%s except all select device_type, device_id, account, action, topic, exchange, %L from old_rows where effect = %L)',
                  lost, 'allow', 'allow', gained, 'deny', 'deny') end)
  into types, devices, accounts;
  perform public.brake_types(types, 'whose rules are narrowed');
  -- Not looked up in their tables: a lock there until the end of the transaction would be in the way of whoever alters them.
  insert into public.brake_impact (kind, name, cause)
  select 'device', x, 'whose rules are narrowed' from unnest(devices) as x where x is not null
  union all select 'account', x, 'whose rules are narrowed' from unnest(accounts) as x where x is not null
  on conflict do nothing;
  get diagnostics n = row_count;
  perform public.brake_count(n);
  return null;
end $$;

create function brake_account() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  n bigint;
begin
  perform public.brake_begin();
  if tg_op = 'DELETE' then
    insert into public.brake_impact (kind, name, cause) select 'account', o.name, 'deleted' from old_rows o on conflict do nothing;
  else
    insert into public.brake_impact (kind, name, cause)
    select 'account', o.name, case when n.name is null then 'renamed' else 'narrowed' end
    from old_rows o left join new_rows n using (name)
    where n.name is null or not (o.client_ids <@ n.client_ids and o.vhosts <@ n.vhosts and o.tags <@ n.tags)
       or (n.networks is not null and n.networks is distinct from o.networks)
       or (n.login, n.password_hash, n.configure, n.write, n.read) is distinct from (o.login, o.password_hash, o.configure, o.write, o.read)
    on conflict do nothing;
  end if;
  get diagnostics n = row_count;
  perform public.brake_count(n);
  return null;
end $$;

create function brake_certificate() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  n bigint;
begin
  perform public.brake_begin();
  insert into public.brake_impact (kind, name, cause)
  select case when coalesce(n.device_id, o.device_id) is null then 'certificate' else 'device' end, coalesce(n.device_id, o.device_id, o.fingerprint), 'whose certificate is revoked'
  from old_rows o join new_rows n using (fingerprint) where o.state = 'active' and n.state = 'revoked' and n.not_after > now()
  on conflict do nothing;
  get diagnostics n = row_count;
  perform public.brake_count(n);
  return null;
end $$;

create function brake_schedule() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  n bigint;
begin
  perform public.brake_begin();
  insert into public.brake_impact (kind, name, cause)
  select 'device', s.device_id, 'scheduled to be ' || s.status from new_rows s where s.status <> 'active' on conflict do nothing;
  get diagnostics n = row_count;
  perform public.brake_count(n);
  return null;
end $$;

-- TRUNCATE leaves nothing: every row of the table counts.
create function brake_truncate() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  n bigint;
begin
  perform public.brake_begin();
  if tg_table_name = 'account' then
    insert into public.brake_impact (kind, name, cause) select 'account', name, 'deleted' from public.account on conflict do nothing;
  else
    insert into public.brake_impact (kind, name, cause)
    select 'device', device_id, case tg_table_name when 'topic_rule' then 'whose rules are narrowed' else 'deleted' end from public.device on conflict do nothing;
  end if;
  get diagnostics n = row_count;
  perform public.brake_count(n);
  return null;
end $$;

create trigger brake_u after update on device referencing old table as old_rows new table as new_rows for each statement execute function brake_device();
create trigger brake_d after delete on device referencing old table as old_rows for each statement execute function brake_device();
create trigger brake_t before truncate on device for each statement execute function brake_truncate();
create trigger brake_u after update on device_type referencing old table as old_rows new table as new_rows for each statement execute function brake_device_type();
create trigger brake_i after insert on topic_rule referencing new table as new_rows for each statement execute function brake_topic_rule();
create trigger brake_u after update on topic_rule referencing old table as old_rows new table as new_rows for each statement execute function brake_topic_rule();
create trigger brake_d after delete on topic_rule referencing old table as old_rows for each statement execute function brake_topic_rule();
create trigger brake_t before truncate on topic_rule for each statement execute function brake_truncate();
create trigger brake_u after update on account referencing old table as old_rows new table as new_rows for each statement execute function brake_account();
create trigger brake_d after delete on account referencing old table as old_rows for each statement execute function brake_account();
create trigger brake_t before truncate on account for each statement execute function brake_truncate();
create trigger brake_u after update on certificate referencing old table as old_rows new table as new_rows for each statement execute function brake_certificate();
create trigger brake_i after insert on device_schedule referencing new table as new_rows for each statement execute function brake_schedule();
create trigger brake_u after update on device_schedule referencing new table as new_rows for each statement execute function brake_schedule();
alter table device enable always trigger brake_u, enable always trigger brake_d, enable always trigger brake_t;
alter table device_type enable always trigger brake_u;
alter table topic_rule enable always trigger brake_i, enable always trigger brake_u, enable always trigger brake_d, enable always trigger brake_t;
alter table account enable always trigger brake_u, enable always trigger brake_d, enable always trigger brake_t;
alter table certificate enable always trigger brake_u;
alter table device_schedule enable always trigger brake_i, enable always trigger brake_u;
revoke execute on function brake_device(), brake_device_type(), brake_topic_rule(), brake_account(), brake_certificate(), brake_schedule(), brake_truncate() from public;

-- Lets this transaction take something from up to `number` devices, accounts and certificates together. The audit trail
-- records how many were accepted and how many were affected.
create function accept_impact(number bigint) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  if number is null or number < 0 then
    perform public.refuse('accept_impact() needs the number of devices that may be touched, as the refusal names it');
  end if;
  insert into public.brake_acceptance (accepted) values (number) on conflict (version) do update set accepted = excluded.accepted;
end $$;
revoke execute on function accept_impact(bigint) from public;

create function brake_accepted() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  known text[] := string_to_array(current_setting('authbackend.impact', true), ':');
  number bigint;
begin
  delete from public.brake_acceptance where version = new.version returning accepted into number;
  if number is not null then
    insert into public.audit (operation, entity, after)
    values ('ACCEPT', 'impact',
            jsonb_build_object('accepted', number, 'touched', case when known[1] = new.version::text then known[2]::bigint else 0 end));
  end if;
  return null;
end $$;
revoke execute on function brake_accepted() from public;
-- At the end of the transaction, when the number is known.
create constraint trigger accepted after insert on brake_acceptance deferrable initially deferred for each row execute function brake_accepted();
alter table brake_acceptance enable always trigger accepted;

create or replace function device_schedule_apply(out made bigint, out fault text)
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '200ms' as $$
declare
  due record;
begin
  made := 0;
  -- What is scheduled was counted when it was scheduled.
  insert into public.brake_acceptance (accepted) values (null) on conflict (version) do nothing;
  for due in select * from public.device_schedule where at <= clock_timestamp() order by at, device_id limit 1000 for update skip locked loop
    perform from public.device where device_id = due.device_id for no key update skip locked;
    continue when not found; -- enforcement_overdue() names who has it
    begin
      insert into public.acting_for (person) values (coalesce(due.actor, session_user));
      perform set_config('authbackend.actor', coalesce(due.claimed_by, ''), true), set_config('authbackend.scheduled', 'yes', true);
      update public.device set status = due.status, status_reason = due.reason
      where device_id = due.device_id and status <> due.status
        and (due.status = 'revoked' or (due.status = 'suspended' and status = 'active') or (due.status = 'active' and status = 'suspended'));
      delete from public.device_schedule where device_id = due.device_id and at = due.at;
      delete from public.acting_for where backend = pg_backend_pid();
      made := made + 1;
    exception
      when others then
        fault := coalesce(fault, format('%s of device %s, scheduled for %s: %s', due.status, due.device_id, due.at, sqlerrm));
    end;
  end loop;
  perform set_config('authbackend.actor', '', true), set_config('authbackend.scheduled', '', true);
end $$;

-- migrate:down
