-- migrate:up

-- A task belongs to one cluster and one lane, so that a slow task, cluster or mass change delays nothing else.
-- See docs/decisions/0008-enforcement.md.

-- The clusters to enforce on. A cluster stays until somebody forgets it by command: its tasks must not disappear with a
-- line of a configuration file.
create table enforcement_cluster (
  name text primary key,
  added_at timestamptz not null default clock_timestamp()
);
call audit_watch('enforcement_cluster', 'enforcement_cluster', 'name');

alter table enforcement
  add column cluster text not null default '', -- empty: from before tasks had clusters; the next leader creates it again for each
  add column lane text not null default 'mass' check (lane in ('urgent', 'small', 'mass')),
  drop constraint enforcement_state_check,
  -- superseded: its cause was undone before it was finished
  add constraint enforcement_state_check check (state in ('waiting', 'checking', 'done', 'superseded'));
alter table enforcement alter column cluster drop default;

drop index enforcement_due, enforcement_finished, enforcement_child;
create index enforcement_due on enforcement (cluster, lane, due_at, id) where finished_at is null;
create index enforcement_finished on enforcement (finished_at) where finished_at is not null;
create index enforcement_user on enforcement (cluster, (details ->> 'common_name')) where state = 'waiting' and lane = 'mass';
create index enforcement_version on enforcement (version, lane);
create unique index enforcement_child on enforcement (parent, name) where parent is not null;

-- A pause of enforcement. It ends by itself.
create table enforcement_pause (
  one boolean primary key default true check (one),
  scope text not null check (scope in ('bulk', 'all')),
  since timestamptz not null default now(),
  until timestamptz not null default now() + interval '1 hour',
  role name not null default session_user,
  actor text default nullif(current_setting('authbackend.actor', true), ''),
  constraint enforcement_pause_until check (case when until <= since + interval '1 hour' then true else public.refuse('a pause of enforcement ends after an hour at the latest; pause again before it ends') end)
);
call audit_watch('enforcement_pause', 'enforcement_pause', 'scope');
create trigger changed after insert or update or delete on enforcement_pause for each statement execute function channel_notify('enforcement');
alter table enforcement_pause enable always trigger changed;

-- No foreign key: a hold must not wait for a transaction that has the device's row locked.
alter table device_hold drop constraint device_hold_device_id_fkey;

-- Sets the lane when the tasks of a transaction are created. Urgent: those that may no longer be connected at all, in a
-- transaction about up to 20 identities. The default is mass, so that tasks of a mass change are written only once.
create function enforcement_lane() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  most constant integer := 20;
  identities integer;
  tasks integer;
  read_at_most integer;
begin
  -- 3 tasks an identity; more than that is a mass change without counting on.
  select 3 * most * greatest(count(*), 1) into read_at_most from public.enforcement_cluster;
  select count(distinct t.identity), count(*) into identities, tasks
  from (select coalesce(details ->> 'common_name', name) as identity from public.enforcement
        where version = pg_current_xact_id() and parent is null limit read_at_most + 1) as t;
  if identities <= most and tasks <= read_at_most then
    update public.enforcement e
    set lane = case when e.kind <> 'device_type' and e.causes && '{revoked,suspended,pending,deleted,expired}' then 'urgent' else 'small' end
    from new_rows n where e.id = n.id and n.parent is null;
  else
    update public.enforcement set lane = 'mass' where version = pg_current_xact_id() and lane in ('urgent', 'small') and parent is null;
  end if;
  return null;
end $$;
create trigger lane after insert on enforcement referencing new table as new_rows for each statement execute function enforcement_lane();
alter table enforcement enable always trigger lane;
revoke execute on function enforcement_lane() from public;

-- When a type's client id patterns are widened, a client id may pass from one device to another. Until the connection and the
-- session that the former owner has with it are gone, the new owner may not log in with it. Part of the copy that decides.
create table client_id_move (
  device_type text primary key, -- whose patterns were widened
  former text[] not null, -- its patterns before
  held text[], -- the client ids with a connection or session; null: not looked up yet, so all that moved are held
  since timestamptz not null default clock_timestamp(),
  until timestamptz not null
);
call change_watch('client_id_move', 'device_type', 'device_type');

-- Whether a device may be connected, so that a change must be enforced: it is active, or has open tasks from an earlier change.
create function enforcement_concerns(of_device text, of_status text) returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
  select of_status = 'active' or exists (select from public.enforcement where kind = 'device' and name = of_device and finished_at is null)
$$;

create or replace function enforcement_device() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  held text[];
begin
  if not exists (select from public.enforcement_setup) then
    return null;
  end if;
  case tg_op
  when 'DELETE' then
    insert into public.enforcement (cluster, kind, name, causes, details)
    select k.name, 'device', o.device_id, '{deleted}', jsonb_build_object('common_name', o.common_name, 'client_ids', t.client_ids)
    from old_rows o left join public.device_type t on t.name = o.type cross join public.enforcement_cluster k where public.enforcement_concerns(o.device_id, o.status);
  when 'UPDATE' then
    with noted as (
      insert into public.enforcement (cluster, kind, name, causes, details)
      select k.name, 'device', o.device_id, c.causes, jsonb_build_object('common_name', o.common_name, 'client_ids', t.client_ids, 'expires_at', n.expires_at)
      from old_rows o left join new_rows n using (device_id) left join public.device_type t on t.name = o.type
      cross join lateral (select array_remove(array[
        case when n.device_id is null then 'deleted' end,
        case when n.status <> 'active' then n.status end,
        case when n.common_name <> o.common_name then 'renamed' end,
        -- A type that is gone was renamed; its own trigger notes that.
        case when n.type <> o.type and t.name is not null then 'retyped' end,
        case when n.attributes <> o.attributes and public.enforcement_attributes_used(n.device_id, n.type, o.attributes, n.attributes) then 'attributes' end,
        case when n.expires_at <= clock_timestamp() and n.expires_at is distinct from o.expires_at then 'expired' end], null) as causes) as c
      cross join public.enforcement_cluster k
      where c.causes <> '{}' and public.enforcement_concerns(o.device_id, o.status)
      returning name, causes)
    select array_agg(distinct name) into held from noted where not causes && '{deleted,pending,suspended,revoked,expired}';
    perform public.enforcement_hold(held);
  else
    null;
  end case;
  if tg_op in ('INSERT', 'UPDATE') then
    -- Who registers APM_1 beside APM takes the client ids that begin with APM_1 from APM; so does APM_1 when it moves to a type
    -- with wider patterns.
    execute format($q$
      with noted as (
        insert into public.enforcement (cluster, kind, name, causes, details)
        select k.name, 'device', t.device_id, '{client_id_owner}', jsonb_strip_nulls(jsonb_build_object('common_name', t.common_name, 'users', t.users, 'former_client_ids', t.former))
        from (select n.device_id, n.common_name, array_agg(distinct d.common_name) as users, %s as former
              from new_rows n %s
              cross join lateral public.client_id_owners(n.device_id) as p
              join public.device d on d.device_id = p and p <> n.device_id join public.device_type t on t.name = d.type
              where n.device_id ~ '[_-]' and t.client_ids <> '{}' %s
              group by n.device_id, n.common_name%s) as t
        cross join public.enforcement_cluster k
        returning name)
      select array_agg(distinct name) from noted$q$,
      case tg_op when 'UPDATE' then 'ot.client_ids' else 'null::text[]' end,
      case tg_op when 'UPDATE' then 'left join old_rows o using (device_id) left join public.device_type ot on ot.name = o.type join public.device_type nt on nt.name = n.type' else '' end,
      case tg_op when 'UPDATE' then 'and (o.device_id is null or (n.type <> o.type and not nt.client_ids <@ ot.client_ids))' else '' end,
      case tg_op when 'UPDATE' then ', ot.client_ids' else '' end) into held;
    perform public.enforcement_hold(held);
  end if;
  perform pg_notify('enforcement', '');
  return null;
end $$;

create or replace function enforcement_device_type() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  if not exists (select from public.enforcement_setup) then
    return null;
  end if;
  -- The patterns before the first of several changes: what a device had then, it keeps.
  insert into public.client_id_move (device_type, former, until)
  select n.name, o.client_ids, case when s.hold_limit_s = 'Infinity' then 'infinity' else clock_timestamp() + make_interval(secs => s.hold_limit_s) end
  from new_rows n join old_rows o using (name), public.enforcement_setup s
  where exists (select from unnest(n.client_ids) as x where x <> all (o.client_ids))
    and exists (select from public.enforcement_cluster)
  order by 1
  on conflict (device_type) do update set held = null, since = clock_timestamp(), until = excluded.until;
  insert into public.enforcement (cluster, kind, name, causes, details)
  select k.name, 'device_type', n.name, c.causes, jsonb_build_object('client_ids', o.client_ids)
  from new_rows n left join old_rows o using (name)
  cross join lateral (select array_remove(array[
    case when o.name is null then 'renamed' end,
    case when exists (select from unnest(o.client_ids) as x where x <> all (n.client_ids)) then 'client_ids' end,
    case when exists (select from unnest(n.client_ids) as x where x <> all (o.client_ids)) then 'client_id_owner' end,
    case when exists (select from unnest(o.vhosts) as x where x <> all (n.vhosts)) then 'vhosts' end,
    case when n.networks is not null and n.networks is distinct from o.networks then 'networks' end], null) as causes) as c
  cross join public.enforcement_cluster k
  where c.causes <> '{}';
  perform pg_notify('enforcement', '');
  return null;
end $$;

create or replace function enforcement_topic_rule() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  lost text := $q$select device_type, device_id, account, action, topic, exchange, 'allow' as effect from old_rows where effect = 'allow'$q$;
  gained text := $q$select device_type, device_id, account, action, topic, exchange, 'deny' as effect from new_rows where effect = 'deny'$q$;
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
    case tg_op when 'INSERT' then gained when 'DELETE' then lost
      -- Rows that say the same as before, but for the note, narrow nothing.
      else format('(%s except all select device_type, device_id, account, action, topic, exchange, %L from new_rows where effect = %L) union all (%s except all select device_type, device_id, account, action, topic, exchange, %L from old_rows where effect = %L)',
                  lost, 'allow', 'allow', gained, 'deny', 'deny') end) into held;
  perform public.enforcement_hold(held);
  perform pg_notify('enforcement', '');
  return null;
end $$;

create or replace function enforcement_account() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  if not exists (select from public.enforcement_setup) then
    return null;
  end if;
  case tg_op
  when 'DELETE' then
    insert into public.enforcement (cluster, kind, name, causes, details)
    select k.name, 'account', o.name, '{deleted}', jsonb_build_object('client_ids', o.client_ids)
    from old_rows o cross join public.enforcement_cluster k;
  else
    insert into public.enforcement (cluster, kind, name, causes, details)
    select k.name, 'account', o.name, c.causes, jsonb_build_object('client_ids', o.client_ids)
    from old_rows o left join new_rows n using (name)
    cross join lateral (select array_remove(array[
      case when n.name is null then 'deleted' end,
      case when (n.login, n.password_hash) is distinct from (o.login, o.password_hash) then 'password' end,
      case when n.tags is distinct from o.tags then 'tags' end,
      case when exists (select from unnest(o.vhosts) as x where x <> all (n.vhosts)) then 'vhosts' end,
      case when n.networks is not null and n.networks is distinct from o.networks then 'networks' end,
      case when exists (select from unnest(o.client_ids) as x where x <> all (n.client_ids)) then 'client_ids' end,
      case when (n.configure, n.write, n.read) is distinct from (o.configure, o.write, o.read)
             or (o.unchecked_dead_lettering and not n.unchecked_dead_lettering) then 'rights' end], null) as causes) as c
    cross join public.enforcement_cluster k
    where c.causes <> '{}';
  end case;
  perform pg_notify('enforcement', '');
  return null;
end $$;

create or replace function enforcement_certificate() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  if not exists (select from public.enforcement_setup) then
    return null;
  end if;
  insert into public.enforcement (cluster, kind, name, causes, details)
  select k.name, 'certificate', n.serial, '{revoked}',
         jsonb_build_object('common_name', n.common_name, 'issuer', n.issuer, 'subject', n.subject, 'not_before', n.not_before, 'not_after', n.not_after)
  from old_rows o join new_rows n using (fingerprint) cross join public.enforcement_cluster k
  where o.state = 'active' and n.state = 'revoked' and n.not_after > now();
  perform pg_notify('enforcement', '');
  return null;
end $$;

-- As before, for each cluster, and without waiting for another session that does the same at this moment.
create or replace function enforcement_note_expired() returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  now_ timestamptz := clock_timestamp();
  since timestamptz;
  n bigint;
begin
  insert into public.enforcement_expiry (noted_until) values (now_) on conflict do nothing;
  select noted_until - interval '5 min' into since from public.enforcement_expiry for update skip locked;
  if since is null then
    return 0;
  end if;
  insert into public.enforcement (cluster, kind, name, causes, details)
  select k.name, 'device', d.device_id, '{expired}', jsonb_build_object('common_name', d.common_name, 'client_ids', t.client_ids, 'expires_at', d.expires_at)
  from public.device d left join public.device_type t on t.name = d.type cross join public.enforcement_cluster k
  where d.expires_at > since and d.expires_at <= now_ and d.status = 'active'
    and not exists (select from public.enforcement e where e.kind = 'device' and e.name = d.device_id and e.causes @> '{expired}'
                      and (e.details ->> 'expires_at')::timestamptz = d.expires_at);
  get diagnostics n = row_count;
  update public.enforcement_expiry set noted_until = now_;
  if n > 0 then
    perform pg_notify('enforcement', '');
  end if;
  return n;
end $$;

-- Who has a row locked, by its xmax: the process ids of the transactions that are still open.
create function row_lock_holders(xmax_ xid) returns setof integer
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
begin
  return query select l.pid from pg_locks l where l.locktype = 'transactionid' and l.granted and l.transactionid = xmax_;
  if found or xmax_ = '0' then
    return;
  end if;
  -- Several hold it: then xmax names a set of transactions.
  return query select distinct l.pid from pg_get_multixact_members(xmax_) m join pg_locks l on l.transactionid = m.xid
  where l.locktype = 'transactionid' and l.granted;
exception when internal_error or invalid_parameter_value then
  return; -- xmax names a transaction that has ended, and no set
end $$;
revoke execute on function row_lock_holders(xid) from public;

-- Scheduled changes that are overdue, with the sessions that keep the row of their device locked.
-- `since` is null where this role may not see it (pg_read_all_stats).
create function enforcement_overdue() returns table (device_id text, at timestamptz, status text, pid integer, application text, role name, since timestamptz)
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  select s.device_id, s.at, s.status, h.pid, a.application_name, a.usename, a.xact_start
  from public.device_schedule s join public.device d using (device_id)
  left join lateral (
    select public.row_lock_holders(d.xmax) as pid
    union select public.row_lock_holders(s.xmax)) as h on true
  left join pg_stat_activity a on a.pid = h.pid
  where s.at < clock_timestamp() - interval '1 second'
  order by s.at, s.device_id
$$;
revoke execute on function enforcement_overdue() from public;

drop function device_schedule_apply();
-- Makes the scheduled changes that are due, each separately: one that fails, or whose device is locked, does not delay the
-- others. Returns how many were made, and the first error.
create function device_schedule_apply(out made bigint, out fault text)
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '200ms' as $$
declare
  due record;
begin
  made := 0;
  for due in select * from public.device_schedule where at <= clock_timestamp() order by at, device_id limit 1000 for update skip locked loop
    perform from public.device where device_id = due.device_id for no key update skip locked;
    continue when not found; -- enforcement_overdue() names who has it
    begin
      perform set_config('authbackend.actor', due.actor, true);
      update public.device set status = due.status, status_reason = due.reason
      where device_id = due.device_id and status <> due.status
        and (due.status = 'revoked' or (due.status = 'suspended' and status = 'active') or (due.status = 'active' and status = 'suspended'));
      delete from public.device_schedule where device_id = due.device_id and at = due.at;
      made := made + 1;
    exception
      when others then
        fault := coalesce(fault, format('%s of device %s, scheduled for %s: %s', due.status, due.device_id, due.at, sqlerrm));
    end;
  end loop;
end $$;
revoke execute on function device_schedule_apply() from public;

-- migrate:down
