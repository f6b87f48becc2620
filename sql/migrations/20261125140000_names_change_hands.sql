-- migrate:up

-- ON CONFLICT needs a unique constraint that is checked immediately; swapping names within one statement needs a deferred one.
-- It is immediate now. In an UPDATE, a name that another device still has gets a comma in front until the end of the statement.
-- Valid names contain no comma, and the statement fails if the name is not free by then, so no other session ever sees one.
alter table device drop constraint device_common_name_key, add constraint device_common_name_key unique (common_name);

create function common_name_without_comma(name text) returns text
language sql immutable parallel safe set search_path = pg_catalog, pg_temp as $$ select case when left(name, 1) = ',' then substr(name, 2) else name end $$;

alter table device drop constraint device_common_name, add constraint device_common_name check (
  case when common_name = device_id then true
    when public.common_name_fault(public.common_name_without_comma(common_name)) is null then true
    else public.refuse(format('common name %L of device %L: %s', common_name, device_id, public.common_name_fault(common_name))) end);

create function device_name_waits() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  holder record;
begin
  if left(new.common_name, 1) = ',' then
    perform public.refuse(format('common name %L of device %L: %s', new.common_name, new.device_id, public.common_name_fault(new.common_name)));
  end if;
  if tg_op = 'INSERT' then
    return new;
  end if;
  if left(old.common_name, 1) = ',' then
    return new; -- it arrives
  end if;
  select device_id, common_name into holder from public.device
  where common_name in (new.common_name, ',' || new.common_name) and device_id <> old.device_id
  order by common_name = new.common_name limit 1; -- first the one for which it waits already
  if not found then
    return new;
  elsif holder.common_name <> new.common_name then
    perform public.refuse_common_name(new.common_name, new.device_id, holder.device_id);
  end if;
  new.common_name := ',' || new.common_name;
  return new;
end $$;

create function refuse_common_name(name text, of_device text, holder text) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  raise exception using errcode = 'unique_violation', schema = 'public', table = 'device', constraint = 'common_name_is_taken',
    message = format('common name %L of device %L: device %L has it, and no two devices can', name, of_device, holder),
    hint = 'Names change hands in one statement: UPDATE device SET common_name = CASE device_id WHEN ... THEN ... END WHERE device_id IN (...)';
end $$;

create function device_name_arrives() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  taken record;
begin
  if not exists (select from new_rows where left(common_name, 1) = ',') then
    return null;
  end if;
  begin
    update public.device d set common_name = public.common_name_without_comma(d.common_name)
    from new_rows n where d.device_id = n.device_id and left(n.common_name, 1) = ',';
  exception when unique_violation then -- not looked for before: who is about to give the name away is waited for
    select h.common_name, n.device_id, h.device_id as holder into taken
    from new_rows n join public.device h on h.common_name = public.common_name_without_comma(n.common_name) and h.device_id <> n.device_id
    where left(n.common_name, 1) = ',' limit 1;
    perform public.refuse_common_name(taken.common_name, taken.device_id, taken.holder);
  end;
  return null;
end $$;
revoke execute on function device_name_waits(), device_name_arrives() from public;

create trigger name_waits_i before insert on device for each row when (left(new.common_name, 1) = ',') execute function device_name_waits();
create trigger name_waits_u before update on device for each row when (new.common_name is distinct from old.common_name) execute function device_name_waits();
-- Its name sorts first among the triggers of its kind, so the others find the final names in the table.
create trigger arrives after update on device referencing new table as new_rows for each statement execute function device_name_arrives();
alter table device enable always trigger name_waits_i, enable always trigger name_waits_u, enable always trigger arrives;

-- A name with a comma is in no audit row and no task: they show the statement as it was written.
create or replace function audit_row(entity text, r jsonb) returns jsonb
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select case
    when entity = 'account' and r is not null
      then r || jsonb_build_object('password_hash', case when r ->> 'password_hash' is null then null else 'set' end)
    when entity = 'crl' then r - 'der'
    when entity = 'device' and left(r ->> 'common_name', 1) = ',' then r || jsonb_build_object('common_name', public.common_name_without_comma(r ->> 'common_name'))
    else r end
$$;

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
     from (' || rows || ') as t
     where ($3 = ''device'' and left(b ->> ''common_name'', 1) = '','') is not true', tg_argv[1])
  using person, tg_op, tg_argv[0], claimed;
  return null;
end $$;

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
      where c.causes <> '{}' and public.enforcement_concerns(o.device_id, o.status) and left(o.common_name, 1) <> ','
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
        select k.name, 'device', t.device_id, '{client_id_owner}', jsonb_strip_nulls(jsonb_build_object('common_name', public.common_name_without_comma(t.common_name), 'users', t.users, 'former_client_ids', t.former))
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

-- migrate:down
