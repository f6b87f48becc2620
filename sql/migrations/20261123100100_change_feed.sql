-- migrate:up

-- The change feed: every statement that changes the registry writes (transaction id, entity, key) rows in its own
-- transaction, and notifies readers. docs/decisions/0002-change-feed.md explains what readers do with them, and why.

create table change (
  txid xid8 not null default pg_current_xact_id(), -- the top-level transaction id, also inside savepoints
  entity text not null,
  key text not null -- '*': everything of this entity
) with (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_insert_scale_factor = 0.2);
create index change_txid on change (txid);

create table change_horizon (at timestamptz primary key default clock_timestamp(), horizon xid8 not null);

create table change_floor (one boolean primary key default true check (one), floor xid8 not null);
insert into change_floor (floor) values (pg_snapshot_xmin(pg_current_snapshot()));

-- Unlogged: emptied by every crash recovery, after which transaction ids may be assigned a second time.
create unlogged table incarnation (one boolean primary key default true check (one), id uuid not null default gen_random_uuid());

-- Arguments: pairs of an entity and the column with its key; a row with a null key is no change of that entity.
create function change_note() returns trigger
language plpgsql security definer set search_path = public, pg_temp as $$
declare
  noted bigint := 0;
  n bigint;
  i integer := 0;
  source text := case tg_op when 'INSERT' then 'select %1$L, %2$I::text from new_rows where %2$I is not null'
                            when 'DELETE' then 'select %1$L, %2$I::text from old_rows where %2$I is not null'
                            else 'select %1$L, %2$I::text from new_rows where %2$I is not null union select %1$L, %2$I::text from old_rows where %2$I is not null' end;
begin
  while i < tg_nargs loop
    if tg_op = 'TRUNCATE' then
      insert into change (entity, key) values (tg_argv[i], '*');
    else
      execute 'insert into change (entity, key) ' || format(source, tg_argv[i], tg_argv[i + 1]);
    end if;
    get diagnostics n = row_count;
    noted := noted + n;
    i := i + 2;
  end loop;
  if noted > 0 then
    perform pg_notify('registry', '');
  end if;
  return null;
end $$;

create procedure change_watch(watched regclass, variadic keys text[])
language plpgsql set search_path = public, pg_temp as $$
declare
  arguments text;
begin
  select string_agg(quote_literal(k), ', ' order by n) into arguments from unnest(keys) with ordinality as u (k, n);
  execute format('create trigger change_i after insert on %s referencing new table as new_rows for each statement execute function change_note(%s)', watched, arguments);
  execute format('create trigger change_u after update on %s referencing old table as old_rows new table as new_rows for each statement execute function change_note(%s)', watched, arguments);
  execute format('create trigger change_d after delete on %s referencing old table as old_rows for each statement execute function change_note(%s)', watched, arguments);
  execute format('create trigger change_t after truncate on %s for each statement execute function change_note(%s)', watched, arguments);
  execute format('alter table %s enable always trigger change_i, enable always trigger change_u, enable always trigger change_d, enable always trigger change_t', watched);
end $$;

call change_watch('device_type', 'device_type', 'name');
call change_watch('device', 'device', 'device_id');
call change_watch('account', 'account', 'name');
call change_watch('topic_rule', 'device_type', 'device_type', 'device', 'device_id', 'account', 'account');

create function incarnation_renew() returns uuid
language sql security definer set search_path = public, pg_temp as $$
  insert into incarnation default values on conflict do nothing;
  select id from incarnation
$$;

-- Deletes change rows of transactions that ended more than `keep` ago; a reader that is further behind loads the whole registry.
create function change_prune(keep interval) returns bigint
language plpgsql security definer set search_path = public, pg_temp as $$
declare
  h xid8;
  n bigint;
begin
  if not pg_try_advisory_xact_lock(724002) then
    return 0;
  end if;
  -- Rows that came with a dump from a cluster whose counter was ahead.
  delete from change where txid >= pg_snapshot_xmax(pg_current_snapshot()) and txid <> pg_current_xact_id();
  delete from change_horizon where horizon > pg_snapshot_xmin(pg_current_snapshot());
  update change_floor set floor = pg_snapshot_xmin(pg_current_snapshot()) where floor > pg_snapshot_xmin(pg_current_snapshot());
  insert into change_horizon (horizon) values (pg_snapshot_xmin(pg_current_snapshot())) on conflict do nothing;
  select horizon into h from change_horizon where at < clock_timestamp() - keep order by at desc limit 1;
  if h is null then
    return 0;
  end if;
  update change_floor set floor = h where floor < h;
  delete from change where txid < h; -- never TRUNCATE: it would hide rows from open snapshots
  get diagnostics n = row_count;
  delete from change_horizon where horizon < h;
  return n;
end $$;

-- Trigger functions too: by a trigger on a temporary table, any role could otherwise write change rows.
revoke execute on function change_prune(interval), incarnation_renew(), change_note(), identity_check(), identity_guard_take(), account_dead_lettering_check() from public;

-- migrate:down
