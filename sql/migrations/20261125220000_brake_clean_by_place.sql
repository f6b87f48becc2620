-- migrate:up

-- By an array of places and not by a subquery: PostgreSQL keeps the plan of a session, and one made while the table was nearly
-- empty compared each of 100,000 rows with each of them, for minutes.
create or replace function brake_clean(most bigint) returns void
language sql security definer set search_path = pg_catalog, pg_temp as $$
  delete from public.brake_impact where ctid = any (array(
    select ctid from public.brake_impact
    where (version < pg_snapshot_xmin(pg_current_snapshot()) or version >= pg_snapshot_xmax(pg_current_snapshot())) and version <> pg_current_xact_id()
    limit most for update skip locked))
$$;

-- migrate:down
