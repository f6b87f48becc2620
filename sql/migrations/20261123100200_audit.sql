-- migrate:up

-- The audit trail: one row for every row that a statement changed, written in the same transaction.

create table audit (
  id bigint generated always as identity primary key,
  at timestamptz not null default clock_timestamp(),
  version xid8 not null default pg_current_xact_id(), -- the registry version: replicas that serve it decide by this change
  role name not null default session_user,
  actor text, -- the person acting through the service: SET authbackend.actor
  application text not null default current_setting('application_name'),
  address inet default inet_client_addr(),
  operation text not null,
  entity text not null,
  key text, -- null: the whole table
  before jsonb,
  after jsonb
);
create index audit_key on audit (entity, key, id);

-- A row as the trail shows it: a password hash is replaced by whether one is set.
create function audit_row(entity text, r jsonb) returns jsonb
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select case when entity = 'account' and r is not null
    then r || jsonb_build_object('password_hash', case when r ->> 'password_hash' is null then null else 'set' end)
    else r end
$$;

-- Arguments: the entity and its key column.
create function audit_note() returns trigger
language plpgsql security definer set search_path = public, pg_temp as $$
declare
  acting text := nullif(current_setting('authbackend.actor', true), '');
  rows text := case tg_op
    when 'INSERT' then 'select null::jsonb as b, to_jsonb(n) as a, n.%1$I::text as k from new_rows n'
    when 'DELETE' then 'select to_jsonb(o) as b, null::jsonb as a, o.%1$I::text as k from old_rows o'
    else 'select to_jsonb(o) as b, to_jsonb(n) as a, coalesce(n.%1$I, o.%1$I)::text as k from old_rows o full join new_rows n on o.%1$I = n.%1$I' end;
begin
  if tg_op = 'TRUNCATE' then
    insert into audit (actor, operation, entity) values (acting, tg_op, tg_argv[0]);
    return null;
  end if;
  execute format(
    'insert into audit (actor, operation, entity, key, before, after)
     select $1, $2, $3, k, audit_row($3, b),
            case when $3 = ''account'' and b ->> ''password_hash'' is distinct from a ->> ''password_hash'' and a ->> ''password_hash'' is not null
              then a || ''{"password_hash": "changed"}'' else audit_row($3, a) end
     from (' || rows || ') as t', tg_argv[1])
  using acting, tg_op, tg_argv[0];
  return null;
end $$;

create procedure audit_watch(watched regclass, entity text, key text)
language plpgsql set search_path = public, pg_temp as $$
begin
  execute format('create trigger audit_i after insert on %s referencing new table as new_rows for each statement execute function audit_note(%L, %L)', watched, entity, key);
  execute format('create trigger audit_u after update on %s referencing old table as old_rows new table as new_rows for each statement execute function audit_note(%L, %L)', watched, entity, key);
  execute format('create trigger audit_d after delete on %s referencing old table as old_rows for each statement execute function audit_note(%L, %L)', watched, entity, key);
  execute format('create trigger audit_t after truncate on %s for each statement execute function audit_note(%L, %L)', watched, entity, key);
  execute format('alter table %s enable always trigger audit_i, enable always trigger audit_u, enable always trigger audit_d, enable always trigger audit_t', watched);
end $$;

call audit_watch('device_type', 'device_type', 'name');
call audit_watch('device', 'device', 'device_id');
call audit_watch('account', 'account', 'name');
call audit_watch('topic_rule', 'topic_rule', 'id');

create function audit_refuse() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  raise exception using errcode = 'insufficient_privilege', message = format('the audit trail is append-only: %s is refused', tg_op);
end $$;
create trigger append_only before update or delete or truncate on audit for each statement execute function audit_refuse();
alter table audit enable always trigger append_only;

-- By a trigger on a temporary table, any role could otherwise write into the trail.
revoke execute on function audit_note() from public;

-- migrate:down
