-- Tasks of enforcement, and the rest of its state.

-- name: enable!
-- Switches enforcement on: without these rows, triggers create no tasks.
-- params: 1 limit of a hold in seconds (Infinity: none), 2 clusters text[]
with setup as (
  insert into enforcement_setup (hold_limit_s) values ($1)
  on conflict (one) do update set hold_limit_s = excluded.hold_limit_s where enforcement_setup.hold_limit_s <> excluded.hold_limit_s)
insert into enforcement_cluster (name) select unnest($2::text[]) on conflict do nothing;

-- name: strangers_with_the_lock
-- Sessions that hold the enforcement lock, which any role may take, without the privileges to enforce.
-- params: 1 number of the lock
select a.pid, a.usename::text as role, a.application_name as application from pg_locks l join pg_stat_activity a using (pid)
where l.locktype = 'advisory' and l.granted and (l.classid, l.objid, l.objsubid) = (0::oid, $1::bigint::oid, 1::smallint) and a.datname = current_database()
  and l.database = a.datid and not has_table_privilege(a.usesysid, 'enforcement', 'update');

-- name: adopt!
-- Open tasks from before tasks had clusters are created again, for each cluster. params: 1 clusters text[]
with old as (
  update enforcement set state = 'superseded', finished_at = clock_timestamp(), receipt = '{"superseded": "noted again for each cluster"}'
  where cluster = '' and finished_at is null returning *)
insert into enforcement (version, cluster, kind, name, causes, details, role, actor, claimed_by, noted_at)
select o.version, k.name, o.kind, o.name, o.causes, o.details, o.role, o.actor, o.claimed_by, o.noted_at from old o, unnest($1::text[]) as k (name) where o.parent is null;

-- name: unknown_clusters
-- params: 1 the clusters of this service
select name from enforcement_cluster where name <> all ($1::text[]) order by 1;

-- name: forget_cluster^
-- Closes the open tasks of the cluster undone. params: 1 name
select clusters, tasks from enforcement_cluster_forget($1);

-- name: disable^
select holds, moves from enforcement_disable();

-- name: enabled$
select exists (select from enforcement_setup);

-- name: note_expired$
select enforcement_note_expired();

-- name: apply_schedule^
select made, fault from device_schedule_apply();

-- name: overdue
select device_id, at, status, pid, application, role, since from enforcement_overdue();

-- name: release_forgotten!
-- Ends holds that no open task needs any more: a leader that died, or a forgotten cluster, may have left them.
with moves as (
  delete from client_id_move where device_type in (
    select m.device_type from client_id_move m where m.since < clock_timestamp() - interval '10 s'
      and not exists (select from enforcement e where e.kind = 'device_type' and e.name = m.device_type and e.finished_at is null)
    for update skip locked))
delete from device_hold where device_id in (
  select h.device_id from device_hold h where h.since < clock_timestamp() - interval '10 s'
    and not exists (select from enforcement e where e.kind = 'device' and e.name = h.device_id and e.finished_at is null)
  for update skip locked);

-- name: due
-- Reads no more rows than it returns, however many tasks are open. `active`: the device may be connected now.
-- params: 1 cluster, 2 lane, 3 ids of tasks in progress, 4 limit
select id, version::text as version, cluster, lane, kind, name, causes, details, noted_at, state, attempts, parent, receipt,
       extract(epoch from clock_timestamp() - due_at)::float8 as due_for_s,
       kind = 'device' and exists (select from device d where d.device_id = e.name and d.status = 'active' and (d.expires_at is null or d.expires_at > clock_timestamp())) as active
from enforcement e
where cluster = $1 and lane = $2 and finished_at is null and due_at <= clock_timestamp() and id <> all ($3::bigint[])
  and not exists (select from enforcement_pause where until > clock_timestamp() and (scope = 'all' or $2 <> 'urgent'))
order by due_at, id limit $4;

-- name: due_of_users
-- Tasks of mass changes about users that are connected. params: 1 cluster, 2 user names, 3 limit
select id, version::text as version, cluster, lane, kind, name, causes, details, noted_at, state, attempts, parent, receipt,
       extract(epoch from clock_timestamp() - due_at)::float8 as due_for_s,
       kind = 'device' and exists (select from device d where d.device_id = e.name and d.status = 'active' and (d.expires_at is null or d.expires_at > clock_timestamp())) as active
from enforcement e
where cluster = $1 and state = 'waiting' and lane = 'mass' and details ->> 'common_name' = any ($2::text[]) and due_at <= clock_timestamp()
  and not exists (select from enforcement_pause where until > clock_timestamp())
limit $3;

-- name: paused^
select scope, since, until, coalesce(actor, role) as by, claimed_by from enforcement_pause where until > clock_timestamp();

-- name: pause!
-- params: 1 scope
select enforcement_pause_begin($1);

-- name: resume$
select enforcement_pause_end();

-- name: confirmation
-- `live`: heard from in the last 10 s, so it will confirm soon.
-- params: 1 transaction ids text[]. Ids that this server has not assigned yet came with a dump, which every replica has loaded.
select name, state = 'live' as live, coalesce(epoch = registry_epoch() and incarnation = (select i.id::text from incarnation i)
         and (select coalesce(bool_and(pg_visible_in_snapshot(v::xid8, snapshot)), true) from unnest($1::text[]) as v
              where v::xid8 < pg_snapshot_xmax(pg_current_snapshot())), false) as serves
from replica_state where may_answer order by name;

-- name: hold!
-- params: 1 device ids text[]
select enforcement_hold($1::text[]);

-- name: release!
-- A hold that a later change has renewed stays. params: 1 device ids text[], 2 task ids bigint[]
delete from device_hold h using (
  select device_id, since from device_hold where device_id = any ($1::text[]) for update skip locked) as seen
where h.device_id = seen.device_id and h.since = seen.since
  and not exists (select from enforcement e where e.kind = 'device' and e.name = h.device_id and e.finished_at is null and e.id <> all ($2::bigint[]));

-- name: add_children!
-- params: 1 parent id, 2 device ids text[], 3 details jsonb[]
insert into enforcement (version, cluster, kind, name, causes, details, role, actor, claimed_by, parent)
select p.version, p.cluster, 'device', u.name, p.causes, u.details, p.role, p.actor, p.claimed_by, p.id
from enforcement p, unnest($2::text[], $3::text[]::jsonb[]) as u (name, details) where p.id = $1
on conflict (parent, name, (details ? 'moved')) where parent is not null do update -- a later check has found more client ids
set state = 'waiting', finished_at = null, due_at = clock_timestamp(), details = enforcement.details || jsonb_build_object(
  'moved', (select jsonb_agg(distinct x) from jsonb_array_elements(coalesce(enforcement.details -> 'moved', '[]') || (excluded.details -> 'moved')) as x),
  'users', (select jsonb_agg(distinct x) from jsonb_array_elements(coalesce(enforcement.details -> 'users', '[]') || (excluded.details -> 'users')) as x))
where not coalesce(enforcement.details -> 'moved', '[]') @> coalesce(excluded.details -> 'moved', '[]');

-- name: hold_client_ids!
-- Only when every cluster and every change of the patterns has been checked. params: 1 device type
update client_id_move set held = (
  select coalesce(array_agg(distinct x order by x), '{}') from enforcement e cross join jsonb_array_elements_text(e.receipt -> 'moved') as x
  where e.kind = 'device_type' and e.name = $1 and e.causes @> '{client_id_owner}' and e.finished_at is null)
where device_type in (select device_type from client_id_move where device_type = $1 for update skip locked)
  and not exists (select from enforcement e where e.kind = 'device_type' and e.name = $1 and e.causes @> '{client_id_owner}'
                    and e.finished_at is null and e.receipt -> 'moved' is null);

-- name: release_client_ids!
-- params: 1 device type, 2 task id
delete from client_id_move where device_type in (select device_type from client_id_move where device_type = $1 for update skip locked)
  and not exists (select from enforcement where kind = 'device_type' and name = $1 and causes @> '{client_id_owner}' and finished_at is null and id <> $2);

-- name: children^
-- params: 1 parent id
select count(distinct name) as number, count(*) filter (where finished_at is null) as open from enforcement where parent = $1;

-- name: check_later!
-- Due at the next full or half second, so that checks after many changes in a row are made together. A locked row stays due.
-- params: 1 ids bigint[], 2 receipts text[], 3 seconds
update enforcement e set state = 'checking', receipt = u.receipt::jsonb, fault = null,
  due_at = case when $3::float8 < 1 then clock_timestamp() + make_interval(secs => $3::float8)
                else to_timestamp(ceil(2 * extract(epoch from clock_timestamp() + make_interval(secs => $3::float8))) / 2) end
from unnest($1::bigint[], $2::text[]) as u (id, receipt)
where e.id = u.id and e.id in (select id from enforcement where id = any ($1::bigint[]) and finished_at is null for update skip locked);

-- name: finish!
-- params: 1 ids bigint[], 2 receipts text[], 3 state
update enforcement e set state = $3, receipt = u.receipt::jsonb, fault = null, finished_at = clock_timestamp()
from unnest($1::bigint[], $2::text[]) as u (id, receipt)
where e.id = u.id and e.id in (select id from enforcement where id = any ($1::bigint[]) and finished_at is null for update skip locked);

-- name: nothing_found!
-- Updates many tasks for which nothing was connected and nothing stored.
-- params: 1 ids bigint[], 2 the common part of the receipts, 3 seconds until the next check (null: the tasks are done)
update enforcement e
set state = case when $3::float8 is null then 'done' else 'checking' end,
    receipt = jsonb_build_object('closed', '{}'::jsonb, 'queues_deleted', '[]'::jsonb, 'subscriptions_removed', '[]'::jsonb,
                                 'took_s', round(extract(epoch from clock_timestamp() - e.noted_at), 3))
              || coalesce(e.receipt, '{}') || $2::text::jsonb
              || jsonb_build_object('confirmed_at', coalesce(nullif(e.receipt -> 'confirmed_at', 'null'), $2::text::jsonb -> 'confirmed_at'),
                                    'looks', coalesce((e.receipt ->> 'looks')::integer, 0) + 1),
    fault = null,
    due_at = clock_timestamp() + make_interval(secs => coalesce($3::float8, 0)),
    finished_at = case when $3::float8 is null then clock_timestamp() end
where id in (select id from enforcement where id = any ($1::bigint[]) and finished_at is null for update skip locked);

-- name: failed!
-- params: 1 ids bigint[], 2 receipts text[] (null: unchanged), 3 seconds until the retry float8[], 4 fault
update enforcement e set fault = $4, attempts = attempts + 1, receipt = coalesce(u.receipt::jsonb, e.receipt), due_at = clock_timestamp() + make_interval(secs => u.after_s)
from unnest($1::bigint[], $2::text[], $3::float8[]) as u (id, receipt, after_s)
where e.id = u.id and e.id in (select id from enforcement where id = any ($1::bigint[]) and finished_at is null for update skip locked);

-- name: lists_of
-- params: 1 issuers, 2 serials
-- row: issuer, serial, CRL number of the first list with it (null: it is on none), and the state of each node that has
--   reported: silent (the last report is no longer valid), installed (that list or a later one) or behind
select c.issuer, c.serial, l.number::text as number,
       coalesce((select jsonb_object_agg(i.node, case when i.counts_until <= clock_timestamp() then 'silent' when i.number >= l.number then 'installed' else 'behind' end)
                 from crl_installed i where i.issuer = c.issuer), '{}') as nodes
from unnest($1::text[], $2::text[]) as c (issuer, serial) left join crl_listed l using (issuer, serial);

-- name: retry_failed!
-- Failed tasks of a cluster that answers again are due now. params: 1 cluster
update enforcement set due_at = clock_timestamp() where id in (
  select id from enforcement where cluster = $1 and finished_at is null and fault is not null and due_at > clock_timestamp() for update skip locked);

-- name: backlog^
select count(*) filter (where state = 'waiting') as waiting, count(*) filter (where state = 'checking') as checking,
       coalesce(extract(epoch from clock_timestamp() - min(noted_at)), 0)::float8 as oldest_s,
       (select count(*) from device_hold where until > clock_timestamp()) as holds,
       (select count(*) from device_hold where until <= clock_timestamp()) as overdue_holds
from enforcement where finished_at is null;

-- name: prune!
-- Receipts are kept for as long as they help somebody on call; the audit trail keeps the changes themselves.
-- A parent is deleted after its children: deleting it first would update them, and they may be locked.
-- params: 1 age in seconds
delete from enforcement where id in (
  select id from enforcement e where finished_at < clock_timestamp() - make_interval(secs => $1)
    and not exists (select from enforcement c where c.parent = e.id)
  limit 10000 for update skip locked);

-- name: save_sweep!
-- params: 1 cluster, 2 report
insert into enforcement_sweep (cluster, at, report) values ($1, clock_timestamp(), $2::text::jsonb)
on conflict (cluster) do update set at = excluded.at, report = excluded.report;

-- name: sweeps
select cluster, at, report from enforcement_sweep order by cluster;

-- name: listed
-- params: 1 state, 2 kind, 3 name, 4 limit; null: any
select id, version::text as version, cluster, lane, kind, name, causes, coalesce(actor, role) as by, claimed_by, noted_at, due_at, state, attempts, fault, finished_at, parent, receipt
from enforcement where ($1::text is null or (case when $1 = 'open' then finished_at is null else state = $1 end))
  and ($2::text is null or kind = $2) and ($3::text is null or name = $3)
order by id desc limit $4;

-- name: one^
-- params: 1 id
select id, version::text as version, cluster, lane, kind, name, causes, details, role, coalesce(actor, role) as by, claimed_by, noted_at, due_at, state, attempts, fault, finished_at, parent, receipt
from enforcement where id = $1;

-- name: of_version
-- params: 1 transaction id text
select id, cluster, kind, name, causes, state, fault, receipt, noted_at, finished_at from enforcement
where version = $1::text::xid8 and parent is null order by id;

-- name: last_about
-- Open tasks about devices, accounts or certificates, and the latest task of each on each cluster. params: 1 kind, 2 names
select id, cluster, kind, name, causes, state, fault, receipt, noted_at, finished_at from enforcement e
where kind = $1 and name = any ($2::text[]) and parent is null
  and (finished_at is null or not exists (select from enforcement l where l.kind = e.kind and l.name = e.name and l.cluster = e.cluster and l.parent is null and l.id > e.id))
order by id;

-- name: retry$
-- Makes tasks due now; a finished one is done again. params: 1 id (null: all open ones)
select enforcement_retry($1::bigint);

-- name: certificates_on_record
-- Certificates that live connections may use: those with these serial numbers, of any issuer, and, for brokers that do not
-- show serial numbers, the revoked ones with these common names. params: 1 serials text[], 2 common names text[]
select serial, issuer, subject, common_name, not_before, not_after, state from certificate where serial = any ($1::text[])
union
select serial, issuer, subject, common_name, not_before, not_after, state from certificate
where state = 'revoked' and not_after > now() and common_name = any ($2::text[]);
