-- The replicas and the registry versions they serve.

-- name: introduce!
-- Committed before a replica's first read, so that every later change waits for it. It replaces earlier starts from the
-- same folder that have ended.
-- params: 1 id of this start, 2 id of the folder, 3 name, 4 program version, 5 workers, 6 longest staleness in seconds,
--   7 earlier starts uuid[], 8 whether all of them have provably ended
with ended as (delete from replica where id = any ($7::uuid[]) and ($8 or stopped_at is not null))
insert into replica (id, folder, name, program_version, workers, longest_staleness_s) values ($1, $2, $3, $4, $5, $6)
on conflict (id) do update set name = excluded.name, program_version = excluded.program_version, workers = excluded.workers,
  longest_staleness_s = excluded.longest_staleness_s, introduced_at = clock_timestamp(), stopped_at = null, comes_back = false;

-- name: known$
-- Returns the first of the ids that has a row. params: 1 ids uuid[]
select id from replica where id = any ($1) order by array_position($1, id) limit 1;

-- name: vouch$
-- Held until the connection ends: it makes the replica count as one that may answer, although it cannot write its row.
-- params: 1 lock, 2 id
select pg_advisory_lock_shared($1, hashtext($2::uuid::text))::text;

-- name: no_vouch$
-- params: as vouch
select pg_advisory_unlock_shared($1, hashtext($2::uuid::text));

-- name: announce!
-- params: 1 to 6 as introduce, 7 epoch, 8 incarnation, 9 snapshot text, 10 start of the read
insert into replica (id, folder, name, program_version, workers, longest_staleness_s, epoch, incarnation, snapshot, confirmed_at)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9::text::pg_snapshot, least($10, clock_timestamp()))
on conflict (id) do update set epoch = excluded.epoch, incarnation = excluded.incarnation, snapshot = excluded.snapshot,
  confirmed_at = excluded.confirmed_at, stopped_at = null;

-- name: sign_off!
-- params: 1 id, 2 comes back
update replica set stopped_at = clock_timestamp(), comes_back = $2 where id = $1;

-- name: forget$
-- params: 1 id or name text
select replica_forget($1);

-- name: now$
select extract(epoch from clock_timestamp())::float8;

-- name: allow_for_a_step!
-- The clock was set forward: moves earlier times forward by as much. If two replicas do it, replicas are only waited for longer.
-- params: 1 seconds
update replica set introduced_at = least(introduced_at + make_interval(secs => $1), clock_timestamp()),
                   confirmed_at = least(confirmed_at + make_interval(secs => $1), clock_timestamp())
where greatest(introduced_at, confirmed_at) <= clock_timestamp() - make_interval(secs => $1);

-- name: prune!
delete from replica where greatest(introduced_at, confirmed_at) + make_interval(secs => longest_staleness_s) < clock_timestamp() - interval '1 day';

-- name: replicas
select id::text as id, folder::text as folder, twins, name, program_version, workers, state, may_answer, introduced_at, confirmed_at, counts_until,
       extract(epoch from clock_timestamp() - confirmed_at)::float8 as age_s,
       pg_snapshot_xmax(snapshot)::text as version,
       coalesce(epoch = registry_epoch() and incarnation = (select id::text from incarnation), false) as same_life
from replica_state order by name, id;

-- name: awaited
-- params: 1 transaction id text
select id::text as id, name, workers, state, confirmed_at, counts_until,
       coalesce(epoch = registry_epoch() and incarnation = (select i.id::text from incarnation i)
                and pg_visible_in_snapshot($1::text::xid8, snapshot), false) as serves
from replica_state where may_answer order by name, id;

-- name: version_status^
-- params: 1 transaction id text
select pg_xact_status($1::text::xid8) as status, registry_life() as life;
