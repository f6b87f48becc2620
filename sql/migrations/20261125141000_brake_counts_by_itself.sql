-- migrate:up

-- Triggers of brake_impact count what is written into it, so that no trigger of another table has to.

create function brake_clean(most bigint) returns void
language sql security definer set search_path = pg_catalog, pg_temp as $$
  delete from public.brake_impact where ctid in (
    select ctid from public.brake_impact
    where (version < pg_snapshot_xmin(pg_current_snapshot()) or version >= pg_snapshot_xmax(pg_current_snapshot())) and version <> pg_current_xact_id()
    limit most for update skip locked)
$$;

-- At the first row of a transaction: deletes some rows of ended transactions, and what an earlier incarnation of the database may
-- have left under this transaction's id.
create function brake_opened() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  if split_part(current_setting('authbackend.impact', true), ':', 1) = pg_current_xact_id()::text then
    return null;
  end if;
  delete from public.brake_impact where version = pg_current_xact_id();
  perform public.brake_clean(1000), set_config('authbackend.impact', pg_current_xact_id()::text || ':0', true);
  return null;
end $$;

-- From how much this transaction has taken something so far, and whether that is beyond both limits; told describes it as text.
create function impact(out touched bigint, out registered bigint, out devices bigint, out percent numeric, out accepted bigint,
                       out beyond_limit boolean, out causes jsonb, out told text)
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  mine constant xid8 := pg_current_xact_id_if_assigned();
begin
  select coalesce(b.devices, 100), coalesce(b.percent, 5), a.accepted into devices, percent, accepted
  from (values (true)) as always left join public.brake b on true left join public.brake_acceptance a on a.version = mine;
  registered := (select count(*) from public.device)
    + (select count(*) from public.brake_impact i where i.version = mine and i.kind = 'device'
       and not exists (select from public.device d where d.device_id = i.name));
  select coalesce(sum(n), 0), coalesce(jsonb_agg(jsonb_build_object('kind', c.kind, 'cause', c.cause, 'number', n, 'names', names) order by n desc, c.kind, c.cause), '[]'),
         coalesce(string_agg(format('%s %s%s (%s)', n, case c.kind when 'device' then '' else c.kind || case when n > 1 then 's ' else ' ' end end, c.cause,
                                    left(array_to_string(names, ', '), 200) || case when n > 3 then ', …' else '' end), ', ' order by n desc, c.kind, c.cause), '')
  into touched, causes, told
  from (select i.kind, i.cause, count(*) as n, array_agg(i.name order by i.name) filter (where place <= 3) as names
        from (select *, row_number() over (partition by kind, cause order by name) as place
              from public.brake_impact where version = mine and kind <> 'device_type') as i
        group by i.kind, i.cause) as c;
  beyond_limit := touched > devices and touched > registered * percent / 100;
end $$;

-- Counts what a statement added, and refuses too much. The sum is kept in a setting, with the number of registered devices
-- when it last mattered, so that a transaction of many statements does not count everything each time.
create function brake_added() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  mine constant text := pg_current_xact_id()::text;
  known text[] := string_to_array(current_setting('authbackend.impact', true), ':');
  added constant bigint := (select count(*) from added_rows where kind <> 'device_type');
  touched bigint := added;
  registered bigint;
  allowed record;
  so_far record;
begin
  if added = 0 then
    return null;
  elsif added > 1000 then
    perform public.brake_clean(added);
  end if;
  if known[1] = mine then
    touched := touched + known[2]::bigint;
    registered := known[3]::bigint;
  end if;
  select coalesce(b.devices, 100) as devices, coalesce(b.percent, 5) as percent, coalesce(a.accepted, 0) as accepted,
         a.version is not null and a.accepted is null as by_time into allowed
  from (values (true)) as always left join public.brake b on true left join public.brake_acceptance a on a.version = pg_current_xact_id();
  if touched > allowed.devices and touched > allowed.accepted and not allowed.by_time and touched > coalesce(registered, 0) * allowed.percent / 100 then
    select * into so_far from public.impact();
    registered := so_far.registered;
    if so_far.beyond_limit then
      raise exception using errcode = 'check_violation', schema = 'public', table = tg_table_name, constraint = 'brake',
        message = format('this transaction would take something from %s devices, accounts or certificates, of %s devices: %s. More than %s and more than %s %% is refused unless it is meant: select accept_impact(%s) in the same transaction, or --accept-impact %s',
                         so_far.touched, so_far.registered, so_far.told, so_far.devices, so_far.percent, so_far.touched, so_far.touched),
        hint = 'This is the number so far; later statements of the transaction may add to it. authbackend policy plan shows that of a whole policy file.';
    end if;
  end if;
  perform set_config('authbackend.impact', concat_ws(':', mine, touched, registered), true);
  return null;
end $$;
revoke execute on function brake_clean(bigint), brake_opened(), impact(), brake_added() from public;
create trigger opened before insert on brake_impact for each statement execute function brake_opened();
create trigger added after insert on brake_impact referencing new table as added_rows for each statement execute function brake_added();
alter table brake_impact enable always trigger opened, enable always trigger added;

create or replace function brake_device() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
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
    where c.cause is not null and left(o.common_name, 1) <> ',' -- a name that waits is counted with the statement that wrote it
    on conflict do nothing;
  end if;
  return null;
end $$;

-- All devices of types that are narrowed, once each in a transaction.
create or replace function brake_types(types text[], cause text) returns void
language sql security definer set search_path = pg_catalog, pg_temp as $$
  with fresh as (
    insert into public.brake_impact (kind, name, cause) select 'device_type', x, '' from unnest(types) as x on conflict do nothing returning name)
  insert into public.brake_impact (kind, name, cause)
  select 'device', d.device_id, $2 from public.device d where d.type in (select name from fresh) on conflict do nothing
$$;

create or replace function brake_device_type() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform public.brake_types(array_agg(n.name), 'of a type that is narrowed') from new_rows n join old_rows o using (name)
  where not (o.client_ids <@ n.client_ids and o.vhosts <@ n.vhosts)
     or (n.networks is not null and n.networks is distinct from o.networks)
     or n.max_staleness_s < o.max_staleness_s or (n.max_staleness_s is not null and o.max_staleness_s is null)
     or (n.require_known_certificate and not o.require_known_certificate)
  having count(*) > 0;
  return null;
end $$;

-- The query, over old_rows and new_rows of a trigger on topic_rule, for added or removed rules that take something away. A rule
-- of which only the note changed does not.
create function narrowing_rules(operation text) returns text
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select case operation when 'INSERT' then denied when 'DELETE' then allowed
    else format('(%s except all %s) union all (%s except all %s)', allowed, replace(allowed, 'old_rows', 'new_rows'), denied, replace(denied, 'new_rows', 'old_rows')) end
  from (select format(rows, 'old_rows', 'allow') as allowed, format(rows, 'new_rows', 'deny') as denied
        from (values ('select device_type, device_id, account, action, topic, exchange, effect from %I where effect = %L')) as v (rows)) as r
$$;

create or replace function brake_topic_rule() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  types text[];
  devices text[];
  accounts text[];
begin
  execute format('select array_agg(distinct device_type) filter (where device_type is not null),
                         array_agg(distinct device_id) filter (where device_id is not null),
                         array_agg(distinct account) filter (where account is not null) from (%s) as narrowed', public.narrowing_rules(tg_op))
  into types, devices, accounts;
  if types is not null then
    perform public.brake_types(types, 'whose rules are narrowed');
  end if;
  -- Not looked up in their tables: a lock there until the end of the transaction would be in the way of whoever alters them.
  insert into public.brake_impact (kind, name, cause)
  select 'device', x, 'whose rules are narrowed' from unnest(devices) as x
  union all select 'account', x, 'whose rules are narrowed' from unnest(accounts) as x
  on conflict do nothing;
  return null;
end $$;

create or replace function enforcement_topic_rule() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  held text[];
begin
  if not exists (select from public.enforcement_setup) then
    return null;
  end if;
  execute format($q$
    with narrowed as (%s),
    owners as (
      select case when device_type is not null then 'device_type' when device_id is not null then 'device' else 'account' end as kind,
             coalesce(device_type, device_id, account) as name,
             jsonb_agg(jsonb_strip_nulls(jsonb_build_object('effect', effect, 'action', action, 'topic', topic, 'exchange', exchange))) as rules
      from narrowed group by 1, 2),
    noted as (
      insert into public.enforcement (cluster, kind, name, causes, details)
      select k.name, w.kind, w.name, '{rules}', jsonb_build_object('rules', w.rules) from owners w cross join public.enforcement_cluster k
      where (w.kind = 'device_type' and exists (select from public.device_type t where t.name = w.name))
         or (w.kind = 'device' and exists (select from public.device d where d.device_id = w.name and public.enforcement_concerns(d.device_id, d.status)))
         or (w.kind = 'account' and exists (select from public.account a where a.name = w.name))
      returning kind, name)
    select array_agg(distinct name) from noted where kind = 'device'$q$,
    public.narrowing_rules(tg_op)) into held;
  perform public.enforcement_hold(held);
  perform pg_notify('enforcement', '');
  return null;
end $$;

create or replace function brake_account() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
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
  return null;
end $$;

create or replace function brake_certificate() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  insert into public.brake_impact (kind, name, cause)
  select case when u.device_id is null then 'certificate' else 'device' end, coalesce(u.device_id, o.fingerprint),
         case when u.device_id is null then 'revoked' else 'whose certificate is revoked' end
  from old_rows o join new_rows n using (fingerprint) cross join lateral (select coalesce(n.device_id, o.device_id) as device_id) as u
  where o.state = 'active' and n.state = 'revoked' and n.not_after > now()
  on conflict do nothing;
  return null;
end $$;

create or replace function brake_schedule() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  insert into public.brake_impact (kind, name, cause)
  select 'device', s.device_id, 'scheduled to be ' || s.status from new_rows s where s.status <> 'active' on conflict do nothing;
  return null;
end $$;

-- TRUNCATE leaves nothing: every row of the table counts.
create or replace function brake_truncate() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  if tg_table_name = 'account' then
    insert into public.brake_impact (kind, name, cause) select 'account', name, 'deleted' from public.account on conflict do nothing;
  else
    insert into public.brake_impact (kind, name, cause)
    select 'device', device_id, case tg_table_name when 'topic_rule' then 'whose rules are narrowed' else 'deleted' end from public.device on conflict do nothing;
  end if;
  return null;
end $$;

drop function brake_begin(), brake_count(bigint);

-- migrate:down
