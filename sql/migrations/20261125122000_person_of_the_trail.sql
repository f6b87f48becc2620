-- migrate:up

-- Who did it: the role that logged in, which the database has authenticated. The name that a client gives (authbackend.actor)
-- is recorded as claimed_by, and counts only if that role was granted authbackend_speaks_for_others (sql/roles.sql).

-- Who scheduled a change, while it is being made; otherwise empty. Only functions of the owner write it. The setting
-- authbackend.scheduled, which any session can set, only says that this table must be read.
create table acting_for (backend integer primary key default pg_backend_pid(), person text not null);

-- The role must be granted directly: to pg_has_role, a superuser is a member of every role.
create function acting_person() returns text
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
declare
  named text := nullif(current_setting('authbackend.actor', true), '');
  speakers oid := to_regrole('authbackend_speaks_for_others');
begin
  if current_setting('authbackend.scheduled', true) = 'yes' then
    return coalesce((select person from public.acting_for where backend = pg_backend_pid()), session_user);
  elsif named is not null and pg_has_role(session_user, speakers, 'MEMBER')
    and exists (select from pg_auth_members m join pg_roles r on r.oid = m.member where m.roleid = speakers and r.rolname = session_user) then
    return named;
  end if;
  return session_user;
end $$;

alter table audit rename column actor to claimed_by;
alter table audit add column actor text; -- null: written before this column; role says who
alter table audit alter column actor set default public.acting_person(),
  alter column claimed_by set default nullif(current_setting('authbackend.actor', true), '');

create or replace function audit_note() returns trigger
language plpgsql security definer set search_path = public, pg_temp as $$
declare
  person text := acting_person();
  claimed text := nullif(current_setting('authbackend.actor', true), '');
  rows text := case tg_op
    when 'INSERT' then 'select null::jsonb as b, to_jsonb(n) as a, n.%1$I::text as k from new_rows n'
    when 'DELETE' then 'select to_jsonb(o) as b, null::jsonb as a, o.%1$I::text as k from old_rows o'
    else 'select to_jsonb(o) as b, to_jsonb(n) as a, coalesce(n.%1$I, o.%1$I)::text as k from old_rows o full join new_rows n on o.%1$I = n.%1$I' end;
begin
  if tg_op = 'TRUNCATE' then
    insert into audit (actor, claimed_by, operation, entity) values (person, claimed, tg_op, tg_argv[0]);
    return null;
  end if;
  execute format(
    'insert into audit (actor, claimed_by, operation, entity, key, before, after)
     select $1, $4, $2, $3, k, audit_row($3, b),
            case when $3 = ''account'' and b ->> ''password_hash'' is distinct from a ->> ''password_hash'' and a ->> ''password_hash'' is not null
              then a || ''{"password_hash": "changed"}'' else audit_row($3, a) end
     from (' || rows || ') as t', tg_argv[1])
  using person, tg_op, tg_argv[0], claimed;
  return null;
end $$;

alter table enforcement rename column actor to claimed_by;
alter table enforcement add column actor text;
-- Evaluated for every row of a mass change, where the call would cost 10 µs: most sessions need no lookup.
alter table enforcement alter column actor set default
  case when current_setting('authbackend.scheduled', true) = 'yes' or pg_has_role(session_user, to_regrole('authbackend_speaks_for_others'), 'MEMBER')
    then public.acting_person() else session_user::text end;

alter table enforcement_pause rename column actor to claimed_by;
alter table enforcement_pause add column actor text;
alter table enforcement_pause alter column actor set default public.acting_person();

alter table device_schedule rename column actor to claimed_by;
alter table device_schedule alter column claimed_by drop not null,
  alter column claimed_by set default nullif(current_setting('authbackend.actor', true), '');
alter table device_schedule add column actor text; -- null: scheduled before this column

-- The change will be made in this person's name, so no statement can set it.
create function device_schedule_person() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  new.actor := public.acting_person();
  new.claimed_by := nullif(current_setting('authbackend.actor', true), '');
  return new;
end $$;
-- Not on a change of the device id: when a device is renamed, its schedule remains that of whoever made it. sql/roles.sql
-- lets no role change the device id of a schedule directly.
create trigger person before insert or update of at, status, reason, actor, claimed_by on device_schedule
  for each row execute function device_schedule_person();
alter table device_schedule enable always trigger person;

create or replace function device_schedule_apply(out made bigint, out fault text)
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '200ms' as $$
declare
  due record;
begin
  made := 0;
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
