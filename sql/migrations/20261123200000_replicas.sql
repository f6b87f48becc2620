-- migrate:up

-- A device type can have a shorter limit for serving from an old copy than the replicas' setting.
alter table device_type add column max_staleness_s double precision; -- null: as long as registry.max_staleness_s
alter table device_type add constraint device_type_max_staleness check (case when max_staleness_s is null or (max_staleness_s > 0 and max_staleness_s < 'Infinity') then true else public.refuse(format('max_staleness_s of device type %L: possible are seconds above 0; null is as long as the replicas allow', name)) end);

-- The running replicas; each writes its own row. No triggers: this is not part of the registry. The same few rows are
-- updated up to fifty times a second, so pages have room for the new row versions.
create table replica (
  id uuid primary key,
  name text not null,
  program_version text not null,
  workers integer not null,
  longest_staleness_s double precision not null check (longest_staleness_s >= 0 and longest_staleness_s <= 1e9),
  introduced_at timestamptz not null default clock_timestamp(), -- committed before the replica first reads the registry
  epoch text, -- null, like the next three: nothing was read yet
  incarnation text,
  snapshot pg_snapshot,
  confirmed_at timestamptz, -- the start of its last read, by this server's clock
  stopped_at timestamptz, -- it signed off
  comes_back boolean not null default false -- it can start again from its copy on disk, without this database
) with (fillfactor = 50);

-- Transaction ids can be compared only within one epoch: the same server start and the same tables.
create function registry_epoch() returns text
language sql stable set search_path = pg_catalog, pg_temp set timezone = 'UTC' set datestyle = 'ISO' as $$
  select concat_ws('/', (select system_identifier from pg_control_system()),
    (select oid from pg_database where datname = current_database()),
    left(pg_walfile_name(pg_current_wal_lsn()), 8), pg_postmaster_start_time(),
    'public.change'::regclass::oid, 'public.device_type'::regclass::oid, 'public.device'::regclass::oid,
    'public.account'::regclass::oid, 'public.topic_rule'::regclass::oid)
$$;

create function registry_life() returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select left(encode(sha256(convert_to(public.registry_epoch() || '/' || coalesce((select id::text from public.incarnation), ''), 'UTF8')), 'hex'), 8)
$$;

-- The registry version of this transaction's changes, for `authbackend wait`.
create function registry_version() returns text
language sql volatile set search_path = pg_catalog, pg_temp as $$
  select public.incarnation_renew();
  select pg_current_xact_id()::text || '@' || public.registry_life();
$$;

-- Which replicas may still answer: all that have not signed off for good, until their copy is too old to answer from,
-- plus 5 s for differences between clocks.
create view replica_state as
select r.*,
       case when stopped_at is not null and not comes_back then 'stopped'
            when counts_until < clock_timestamp() then 'gone'
            when stopped_at is not null then 'stopped'
            when snapshot is null then 'starting'
            when seen_at < clock_timestamp() - interval '10 s' then 'silent'
            else 'live' end as state,
       (stopped_at is null or comes_back) and counts_until >= clock_timestamp() as may_answer,
       counts_until
from replica r
cross join lateral (select greatest(introduced_at, confirmed_at) as seen_at) as s
cross join lateral (select seen_at + make_interval(secs => longest_staleness_s + 5) as counts_until) as u;

-- migrate:down
