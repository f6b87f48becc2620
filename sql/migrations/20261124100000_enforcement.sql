-- migrate:up

-- Enforcement: RabbitMQ does not ask again about clients that are already connected, so whatever a change takes away must
-- also be taken from live connections and stored sessions. Triggers create tasks for that in the transaction of the change,
-- whoever makes it; one replica at a time works them off. See docs/decisions/0008-enforcement.md.

-- One row where a service enforces; without it there are no tasks and no holds.
create table enforcement_setup (
  one boolean primary key default true check (one),
  hold_limit_s double precision not null check (hold_limit_s > 0) -- Infinity: until the task is done
);

create table enforcement (
  id bigint generated always as identity primary key,
  version xid8 not null default pg_current_xact_id(), -- registry version of the change
  kind text not null check (kind in ('device', 'device_type', 'account')),
  name text not null, -- device id, or name of the type or account
  causes text[] not null, -- what narrowed
  details jsonb not null default '{}', -- what only the old rows contained
  parent bigint references enforcement (id) on delete set null, -- the task on whose behalf it was created
  role name not null default session_user,
  actor text default nullif(current_setting('authbackend.actor', true), ''),
  noted_at timestamptz not null default clock_timestamp(),
  due_at timestamptz not null default clock_timestamp(),
  state text not null default 'waiting' check (state in ('waiting', 'checking', 'done')),
  attempts integer not null default 0,
  fault text, -- why the last attempt failed
  receipt jsonb, -- what was done
  finished_at timestamptz
);
create index enforcement_due on enforcement (due_at) where state <> 'done';
create index enforcement_finished on enforcement (finished_at) where state = 'done';
create index enforcement_of on enforcement (kind, name, id);
create unique index enforcement_child on enforcement (parent, name) where parent is not null;

-- A device that stays active may not log in while its connections and sessions are repaired.
create table device_hold (
  device_id text primary key references device (device_id) on update cascade on delete cascade,
  since timestamptz not null default clock_timestamp(),
  until timestamptz not null
);
call change_watch('device_hold', 'device', 'device_id');

-- A change of status that is to happen later.
create table device_schedule (
  device_id text not null references device (device_id) on update cascade on delete cascade,
  at timestamptz not null,
  status text not null,
  reason text not null default '',
  actor text not null default coalesce(nullif(current_setting('authbackend.actor', true), ''), session_user::text),
  primary key (device_id, at),
  constraint device_schedule_status check (case when status in ('active', 'suspended', 'revoked') then true else public.refuse(format('scheduled status %L of device %L: possible are active, suspended and revoked', status, device_id)) end),
  constraint device_schedule_at check (case when at >= '1970-01-01Z' and at < '9999-12-31Z' then true else public.refuse(format('scheduled time of device %L: possible are the years 1970 to 9999', device_id)) end)
);
create index device_schedule_due on device_schedule (at);
call audit_watch('device_schedule', 'device_schedule', 'device_id');

-- How far the expiry times of devices have been turned into tasks.
create table enforcement_expiry (one boolean primary key default true check (one), noted_until timestamptz not null);
create index device_expiry on device (expires_at) where expires_at is not null;

-- The last sweep of each cluster.
create table enforcement_sweep (
  cluster text primary key,
  at timestamptz not null,
  report jsonb not null
);

create function enforcement_hold(device_ids text[]) returns void
language sql security definer set search_path = pg_catalog, pg_temp as $$
  insert into public.device_hold (device_id, until)
  select d.device_id, case when s.hold_limit_s = 'Infinity' then 'infinity' else clock_timestamp() + make_interval(secs => s.hold_limit_s) end
  from unnest(device_ids) as u (device_id) join public.device d using (device_id), public.enforcement_setup s
  where d.status = 'active'
  order by 1
  on conflict (device_id) do update set since = clock_timestamp(), until = excluded.until
$$;

-- Whether a topic rule of a device uses an attribute that changed.
create function enforcement_attributes_used(of_device text, of_type text, before jsonb, after jsonb) returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
  select exists (
    select from jsonb_each(before) b full join jsonb_each(after) a using (key)
    join public.topic_rule r on r.device_type = of_type or r.device_id = of_device
    where a.value is distinct from b.value and position('{attr.' || key || '}' in r.topic) > 0)
$$;

create function enforcement_device() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  held text[];
begin
  if not exists (select from public.enforcement_setup) then
    return null;
  end if;
  case tg_op
  when 'DELETE' then
    insert into public.enforcement (kind, name, causes, details)
    select 'device', o.device_id, '{deleted}', jsonb_build_object('common_name', o.common_name, 'client_ids', t.client_ids)
    from old_rows o left join public.device_type t on t.name = o.type where o.status = 'active';
  when 'UPDATE' then
    with noted as (
      insert into public.enforcement (kind, name, causes, details)
      select 'device', o.device_id, c.causes, jsonb_build_object('common_name', o.common_name, 'client_ids', t.client_ids)
      from old_rows o left join new_rows n using (device_id) left join public.device_type t on t.name = o.type
      cross join lateral (select array_remove(array[
        case when n.device_id is null then 'deleted' end,
        case when n.status <> 'active' then n.status end,
        case when n.common_name <> o.common_name then 'renamed' end,
        -- A type that is gone was renamed; its own trigger notes that.
        case when n.type <> o.type and t.name is not null then 'retyped' end,
        case when n.attributes <> o.attributes and public.enforcement_attributes_used(n.device_id, n.type, o.attributes, n.attributes) then 'attributes' end,
        case when n.expires_at <= clock_timestamp() and n.expires_at is distinct from o.expires_at then 'expired' end], null) as causes) as c
      where o.status = 'active' and c.causes <> '{}'
      returning name, causes)
    select array_agg(name) into held from noted where not causes && '{deleted,pending,suspended,revoked,expired}';
    perform public.enforcement_hold(held);
  else
    null;
  end case;
  if tg_op in ('INSERT', 'UPDATE') then
    -- Who registers APM_1 beside APM takes the client ids that begin with APM_1 from APM.
    execute format($q$
      with noted as (
        insert into public.enforcement (kind, name, causes, details)
        select 'device', n.device_id, '{client_id_owner}', jsonb_build_object('common_name', n.common_name, 'users', array_agg(distinct d.common_name))
        from new_rows n %s
        cross join lateral public.client_id_owners(n.device_id) as p
        join public.device d on d.device_id = p and p <> n.device_id join public.device_type t on t.name = d.type
        where n.device_id ~ '[_-]' and t.client_ids <> '{}' %s
        group by n.device_id, n.common_name
        returning name)
      select array_agg(name) from noted$q$,
      case tg_op when 'UPDATE' then 'left join old_rows o using (device_id)' else '' end,
      case tg_op when 'UPDATE' then 'and o.device_id is null' else '' end) into held;
    perform public.enforcement_hold(held);
  end if;
  perform pg_notify('enforcement', '');
  return null;
end $$;

create function enforcement_device_type() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  if not exists (select from public.enforcement_setup) then
    return null;
  end if;
  insert into public.enforcement (kind, name, causes)
  select 'device_type', n.name, c.causes
  from new_rows n left join old_rows o using (name)
  cross join lateral (select array_remove(array[
    case when o.name is null then 'renamed' end,
    case when exists (select from unnest(o.client_ids) as x where x <> all (n.client_ids)) then 'client_ids' end,
    case when exists (select from unnest(o.vhosts) as x where x <> all (n.vhosts)) then 'vhosts' end,
    case when n.networks is not null and n.networks is distinct from o.networks then 'networks' end], null) as causes) as c
  where c.causes <> '{}';
  perform pg_notify('enforcement', '');
  return null;
end $$;

-- What rules stop allowing: allow rules that are gone, deny rules that are new, by owner.
create function enforcement_topic_rule() returns trigger
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
             jsonb_agg(jsonb_build_object('effect', effect, 'action', action, 'topic', topic)) as rules
      from narrowed group by 1, 2),
    noted as (
      insert into public.enforcement (kind, name, causes, details)
      select w.kind, w.name, '{rules}', jsonb_build_object('rules', w.rules) from owners w
      where (w.kind = 'device_type' and exists (select from public.device_type t where t.name = w.name))
         or (w.kind = 'device' and exists (select from public.device d where d.device_id = w.name and d.status = 'active'))
         or (w.kind = 'account' and exists (select from public.account a where a.name = w.name))
      returning kind, name)
    select array_agg(name) from noted where kind = 'device'$q$,
    case tg_op when 'INSERT' then gained when 'DELETE' then lost
      -- Rows that say the same as before, but for the note, narrow nothing.
      else format('(%s except all select device_type, device_id, account, action, topic, exchange, %L from new_rows where effect = %L) union all (%s except all select device_type, device_id, account, action, topic, exchange, %L from old_rows where effect = %L)',
                  lost, 'allow', 'allow', gained, 'deny', 'deny') end) into held;
  perform public.enforcement_hold(held);
  perform pg_notify('enforcement', '');
  return null;
end $$;

create function enforcement_account() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  if not exists (select from public.enforcement_setup) then
    return null;
  end if;
  case tg_op
  when 'DELETE' then
    insert into public.enforcement (kind, name, causes, details)
    select 'account', name, '{deleted}', jsonb_build_object('client_ids', client_ids) from old_rows;
  else
    insert into public.enforcement (kind, name, causes, details)
    select 'account', o.name, c.causes, jsonb_build_object('client_ids', o.client_ids)
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
    where c.causes <> '{}';
  end case;
  perform pg_notify('enforcement', '');
  return null;
end $$;

create trigger enforcement_i after insert on device referencing new table as new_rows for each statement execute function enforcement_device();
create trigger enforcement_u after update on device referencing old table as old_rows new table as new_rows for each statement execute function enforcement_device();
create trigger enforcement_d after delete on device referencing old table as old_rows for each statement execute function enforcement_device();
create trigger enforcement_u after update on device_type referencing old table as old_rows new table as new_rows for each statement execute function enforcement_device_type();
create trigger enforcement_i after insert on topic_rule referencing new table as new_rows for each statement execute function enforcement_topic_rule();
create trigger enforcement_u after update on topic_rule referencing old table as old_rows new table as new_rows for each statement execute function enforcement_topic_rule();
create trigger enforcement_d after delete on topic_rule referencing old table as old_rows for each statement execute function enforcement_topic_rule();
create trigger enforcement_u after update on account referencing old table as old_rows new table as new_rows for each statement execute function enforcement_account();
create trigger enforcement_d after delete on account referencing old table as old_rows for each statement execute function enforcement_account();
alter table device enable always trigger enforcement_i, enable always trigger enforcement_u, enable always trigger enforcement_d;
alter table device_type enable always trigger enforcement_u;
alter table topic_rule enable always trigger enforcement_i, enable always trigger enforcement_u, enable always trigger enforcement_d;
alter table account enable always trigger enforcement_u, enable always trigger enforcement_d;

-- Creates tasks for expired devices. Goes back 5 minutes, for transactions that took long to commit.
create function enforcement_note_expired() returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  now_ timestamptz := clock_timestamp();
  since timestamptz;
  n bigint;
begin
  insert into public.enforcement_expiry (noted_until) values (now_) on conflict do nothing;
  select noted_until - interval '5 min' into since from public.enforcement_expiry for update;
  insert into public.enforcement (kind, name, causes, details)
  select 'device', d.device_id, '{expired}', jsonb_build_object('common_name', d.common_name, 'client_ids', t.client_ids, 'expires_at', d.expires_at)
  from public.device d left join public.device_type t on t.name = d.type
  where d.expires_at > since and d.expires_at <= now_ and d.status = 'active'
    and not exists (select from public.enforcement e where e.kind = 'device' and e.name = d.device_id and e.causes = '{expired}'
                      and (e.details ->> 'expires_at')::timestamptz = d.expires_at);
  get diagnostics n = row_count;
  update public.enforcement_expiry set noted_until = now_;
  return n;
end $$;

-- Makes the scheduled changes of status that are due, in the name of whoever scheduled them.
create function device_schedule_apply() returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  due record;
  n bigint := 0;
begin
  for due in select * from public.device_schedule where at <= clock_timestamp() order by at, device_id for update skip locked loop
    perform set_config('authbackend.actor', due.actor, true);
    update public.device set status = due.status, status_reason = due.reason
    where device_id = due.device_id and status <> due.status
      and (due.status = 'revoked' or (due.status = 'suspended' and status = 'active') or (due.status = 'active' and status = 'suspended'));
    delete from public.device_schedule where device_id = due.device_id and at = due.at;
    n := n + 1;
  end loop;
  return n;
end $$;

revoke execute on function enforcement_hold(text[]), enforcement_device(), enforcement_device_type(), enforcement_topic_rule(),
  enforcement_account(), enforcement_note_expired(), device_schedule_apply() from public;

-- migrate:down
