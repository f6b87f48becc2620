-- migrate:up

-- Only the service writes the tables of enforcement and replicas. People change them by these functions, which write rows
-- into the audit trail.

call audit_watch('enforcement_setup', 'enforcement_setup', 'one');

-- Makes a task due now (null: all open ones); a finished one is done again. Returns how many.
create function enforcement_retry(task bigint) returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  n bigint;
begin
  with seen as (
    select * from public.enforcement where case when task is null then finished_at is null else id = task end order by id for update),
  again as (
    update public.enforcement e set due_at = clock_timestamp(), state = case when e.finished_at is null then e.state else 'waiting' end, finished_at = null
    from seen s where e.id = s.id returning e.id, to_jsonb(s) as before, to_jsonb(e) as after)
  insert into public.audit (operation, entity, key, before, after) select 'UPDATE', 'enforcement', id::text, before, after from again;
  get diagnostics n = row_count;
  perform pg_notify('enforcement', '');
  return n;
end $$;

-- Begins a pause of an hour, or restarts it.
create function enforcement_pause_begin(of_scope text) returns void
language sql security definer set search_path = pg_catalog, pg_temp as $$
  insert into public.enforcement_pause (scope) values (of_scope)
  on conflict (one) do update set scope = excluded.scope, since = excluded.since, until = excluded.until,
    role = excluded.role, actor = excluded.actor, claimed_by = excluded.claimed_by
$$;

create function enforcement_pause_end() returns boolean
language sql security definer set search_path = pg_catalog, pg_temp as $$
  with gone as (delete from public.enforcement_pause returning 1) select exists (select from gone)
$$;

-- Stops creating tasks for a cluster, and closes its open ones undone.
create function enforcement_cluster_forget(cluster_name text, out clusters bigint, out tasks bigint)
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  delete from public.enforcement_cluster where name = cluster_name;
  get diagnostics clusters = row_count;
  with seen as (
    select * from public.enforcement where cluster = cluster_name and finished_at is null order by id for update),
  closed as (
    update public.enforcement e set state = 'superseded', finished_at = clock_timestamp(),
      receipt = coalesce(e.receipt, '{}') || '{"superseded": "the cluster was forgotten; what is connected there was not looked at again"}'
    from seen s where e.id = s.id returning e.id, to_jsonb(s) as before, to_jsonb(e) as after)
  insert into public.audit (operation, entity, key, before, after) select 'UPDATE', 'enforcement', id::text, before, after from closed;
  get diagnostics tasks = row_count;
end $$;

-- Switches enforcement off and ends all holds. Returns how many, of devices and of client ids that moved.
create function enforcement_disable(out holds bigint, out moves bigint)
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  delete from public.enforcement_setup;
  delete from public.enforcement_cluster;
  with gone as (delete from public.device_hold returning *)
  insert into public.audit (operation, entity, key, before) select 'DELETE', 'device_hold', device_id, to_jsonb(gone) from gone;
  get diagnostics holds = row_count;
  with gone as (delete from public.client_id_move returning *)
  insert into public.audit (operation, entity, key, before) select 'DELETE', 'client_id_move', device_type, to_jsonb(gone) from gone;
  get diagnostics moves = row_count;
end $$;

-- Deletes replicas by id or name, so that nothing waits for them. Returns how many.
create function replica_forget(which text) returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  n bigint;
begin
  with gone as (delete from public.replica where id::text = which or name = which returning *)
  insert into public.audit (operation, entity, key, before) select 'DELETE', 'replica', id::text, to_jsonb(gone) from gone;
  get diagnostics n = row_count;
  return n;
end $$;

revoke execute on function enforcement_retry(bigint), enforcement_pause_begin(text), enforcement_pause_end(),
  enforcement_cluster_forget(text), enforcement_disable(), replica_forget(text) from public;

-- migrate:down
