-- The work of enforcement.

-- name: enable!
-- Triggers note work only where somebody does it. params: 1 seconds, Infinity for no limit
insert into enforcement_setup (hold_limit_s) values ($1) on conflict (one) do update set hold_limit_s = excluded.hold_limit_s;

-- name: disable!
with gone as (delete from device_hold) delete from enforcement_setup;

-- name: enabled$
select exists (select from enforcement_setup);

-- name: note_expired$
select enforcement_note_expired();

-- name: apply_schedule$
select device_schedule_apply();

-- name: due
-- Small changes first: a mass change must not keep a single revocation waiting. params: 1 how many
select id, version::text as version, kind, name, causes, details, noted_at, state, attempts, parent, receipt
from (select e.*, case when parent is not null then 1000 else count(*) over (partition by version) end as together
      from enforcement e where state <> 'done' and due_at <= clock_timestamp()) as open
order by together > 20, due_at, id limit $1;

-- name: confirmation
-- params: 1 transaction ids text[]. Ids that this server has not given out came with a dump: everybody has loaded them.
select name, coalesce(epoch = registry_epoch() and incarnation = (select i.id::text from incarnation i)
         and (select coalesce(bool_and(pg_visible_in_snapshot(v::xid8, snapshot)), true) from unnest($1::text[]) as v
              where v::xid8 < pg_snapshot_xmax(pg_current_snapshot())), false) as serves
from replica_state where may_answer order by name;

-- name: hold!
-- params: 1 device ids text[]
select enforcement_hold($1::text[]);

-- name: release!
-- A hold that a later change has taken again stays. params: 1 device ids text[], 2 task ids bigint[]
delete from device_hold h using (select device_id, since from device_hold where device_id = any ($1::text[])) as seen
where h.device_id = seen.device_id and h.since = seen.since
  and not exists (select from enforcement e where e.kind = 'device' and e.name = h.device_id and e.state <> 'done' and e.id <> all ($2::bigint[]));

-- name: add_children!
-- params: 1 parent id, 2 device ids text[], 3 details jsonb[]
insert into enforcement (version, kind, name, causes, details, role, actor, parent)
select p.version, 'device', u.name, p.causes, u.details, p.role, p.actor, p.id
from enforcement p, unnest($2::text[], $3::text[]::jsonb[]) as u (name, details) where p.id = $1
on conflict (parent, name) where parent is not null do nothing;

-- name: children
-- params: 1 parent id
select state, count(*) as number from enforcement where parent = $1 group by state;

-- name: check_later!
-- params: 1 ids bigint[], 2 receipts text[], 3 seconds
update enforcement e set state = 'checking', receipt = u.receipt::jsonb, fault = null, due_at = clock_timestamp() + make_interval(secs => $3)
from unnest($1::bigint[], $2::text[]) as u (id, receipt) where e.id = u.id;

-- name: finish!
-- params: 1 ids bigint[], 2 receipts text[]
update enforcement e set state = 'done', receipt = u.receipt::jsonb, fault = null, finished_at = clock_timestamp()
from unnest($1::bigint[], $2::text[]) as u (id, receipt) where e.id = u.id;

-- name: failed!
-- params: 1 ids bigint[], 2 fault, 3 seconds
update enforcement set fault = $2, attempts = attempts + 1, due_at = clock_timestamp() + make_interval(secs => $3) where id = any ($1::bigint[]);

-- name: backlog^
select count(*) filter (where state = 'waiting') as waiting, count(*) filter (where state = 'checking') as checking,
       coalesce(extract(epoch from clock_timestamp() - min(noted_at)), 0)::float8 as oldest_s,
       (select count(*) from device_hold where until > clock_timestamp()) as holds,
       (select count(*) from device_hold where until <= clock_timestamp()) as overdue_holds
from enforcement where state <> 'done';

-- name: prune!
-- Receipts are kept as long as the trail is useful to somebody on call; the audit trail keeps the changes themselves.
-- params: 1 seconds
delete from enforcement e where state = 'done' and finished_at < clock_timestamp() - make_interval(secs => $1)
  and not exists (select from enforcement c where c.parent = e.id and c.state <> 'done');

-- name: keep_sweep!
-- params: 1 cluster, 2 report
insert into enforcement_sweep (cluster, at, report) values ($1, clock_timestamp(), $2::text::jsonb)
on conflict (cluster) do update set at = excluded.at, report = excluded.report;

-- name: sweeps
select cluster, at, report from enforcement_sweep order by cluster;

-- name: listed
-- params: 1 state or null, 2 kind or null, 3 name or null, 4 how many
select id, version::text as version, kind, name, causes, coalesce(actor, role) as by, noted_at, due_at, state, attempts, fault, finished_at, parent, receipt
from enforcement where ($1::text is null or (case when $1 = 'open' then state <> 'done' else state = $1 end))
  and ($2::text is null or kind = $2) and ($3::text is null or name = $3)
order by id desc limit $4;

-- name: one^
-- params: 1 id
select id, version::text as version, kind, name, causes, details, role, actor, noted_at, due_at, state, attempts, fault, finished_at, parent, receipt
from enforcement where id = $1;

-- name: of_version
-- params: 1 transaction id text
select id, kind, name, causes, state, fault, receipt, noted_at, finished_at from enforcement
where version = $1::text::xid8 and parent is null order by id;

-- name: retry$
-- Make open tasks due at once; a done one is done again. params: 1 id or null for all open ones
with again as (
  update enforcement set due_at = clock_timestamp(), state = case when state = 'done' then 'waiting' else state end, finished_at = null
  where case when $1::bigint is null then state <> 'done' else id = $1 end returning 1),
told as (select pg_notify('enforcement', ''))
select (select count(*) from again) from told;

-- name: serial_states
-- Revoked where several authorities have given the same number and one of the certificates is. params: 1 serials text[]
select serial, max(state) as state from certificate where serial = any ($1::text[]) group by serial;
