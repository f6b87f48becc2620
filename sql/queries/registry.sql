-- The registry and its changes, for the copy in memory.

-- name: lock_registry!
-- A reader takes these locks before its snapshot: a table rewritten or truncated after the snapshot would look empty.
lock table device_type, client_id_move, device, device_hold, account, topic_rule, change, change_floor, incarnation in access share mode;

-- name: locked_by
-- Who keeps lock_registry waiting: sessions that hold or wait for an ACCESS EXCLUSIVE lock, and who blocks these.
-- row: table, pid of the exclusive lock, since when it waits, and the session that everybody waits for: pid, role,
--   application, start of its transaction, state
select l.relation::regclass::text as held, l.pid as exclusive, l.waitstart as waits_since, b.pid, a.*
from pg_locks l
cross join lateral (select unnest(pg_blocking_pids(l.pid)) as pid where not l.granted union all select l.pid where l.granted) as b
left join lateral (select usesysid::regrole::text as role, application_name as application, xact_start as since, state
                   from pg_stat_get_activity(b.pid)) as a on true
where l.locktype = 'relation' and l.mode = 'AccessExclusiveLock'
  and l.database = (select oid from pg_database where datname = current_database())
  and (l.relation in ('public.change'::regclass, 'public.change_floor'::regclass, 'public.incarnation'::regclass)
       or l.relation in (select tgrelid from pg_trigger where tgfoid = 'public.change_note'::regproc))
order by l.granted desc, l.waitstart, b.pid;

-- name: application^
-- params: 1 pid
select usesysid::regrole::text as role, application_name as application, xact_start as since, state from pg_stat_get_activity($1);

-- name: position^
-- The position of a read in the change feed. params: 1 names of the watched tables that the reader knows
-- row: snapshot text, the server's clock, floor text, incarnation text or null, epoch text, number of enabled triggers,
--   oldest program text
select pg_current_snapshot()::text as snapshot, clock_timestamp() as at,
       (select floor::text from change_floor) as floor,
       (select id::text from incarnation) as incarnation,
       registry_epoch() as epoch,
       (select count(*) from pg_trigger where tgfoid = 'public.change_note'::regproc and tgenabled = 'A' and tgrelid = any ($1::text[]::regclass[])
          and tgname in ('change_i', 'change_u', 'change_d', 'change_t')) as triggers,
       registry_oldest_program() as oldest_program;

-- name: server^
-- Read before the locks, because a newer schema may lack the tables to lock.
select pg_is_in_recovery() as standby, registry_oldest_program() as oldest_program;

-- name: changes_since
-- Changes not visible to the snapshot of a position. params: 1 xmax text, 2 xip text[]; uses the index change_txid
select distinct entity, key from change where txid >= $1::text::xid8 or txid = any ($2::text[]::xid8[]);

-- name: renew_incarnation$
select incarnation_renew()::text;

-- name: prune$
-- params: 1 retention in seconds
select change_prune(make_interval(secs => $1));

-- Rows in the format of the store, which authbackend/registry/records.py describes.

-- name: all_device_types
select name, convert_to(json_build_object('name', name, 'client_ids', client_ids, 'vhosts', vhosts, 'networks', networks::text[],
         'max_staleness_s', max_staleness_s, 'require_known_certificate', require_known_certificate,
         'move', (select json_build_array(m.former, m.held, extract(epoch from m.until)::float8::text) from client_id_move m where m.device_type = t.name),
         'rules', (select json_agg(json_build_array(r.id, r.effect, r.action, r.topic, r.exchange) order by r.id) from topic_rule r where r.device_type = t.name))::text, 'UTF8') as record
from device_type t;

-- name: device_types
select name, convert_to(json_build_object('name', name, 'client_ids', client_ids, 'vhosts', vhosts, 'networks', networks::text[],
         'max_staleness_s', max_staleness_s, 'require_known_certificate', require_known_certificate,
         'move', (select json_build_array(m.former, m.held, extract(epoch from m.until)::float8::text) from client_id_move m where m.device_type = t.name),
         'rules', (select json_agg(json_build_array(r.id, r.effect, r.action, r.topic, r.exchange) order by r.id) from topic_rule r where r.device_type = t.name))::text, 'UTF8') as record
from device_type t where name = any ($1::text[]);

-- name: all_devices
-- row: common name, record, device id if it differs from the common name; all bytea
select convert_to(common_name, 'UTF8') as name, convert_to(concat_ws(E'\t', left(status, 1) || type, case when device_id <> common_name then device_id else '' end,
         coalesce(extract(epoch from expires_at)::float8::text, ''), case when attributes <> '{}' then attributes::text else '' end,
         coalesce(own.rules, ''), coalesce(extract(epoch from h.until)::float8::text, '')), 'UTF8') as record,
       case when device_id <> common_name then convert_to(device_id, 'UTF8') end as other_id
from device d
left join device_hold h using (device_id)
left join (select r.device_id, json_agg(json_build_array(r.id, r.effect, r.action, r.topic, r.exchange) order by r.id)::text as rules from topic_rule r where r.device_id is not null group by r.device_id) own
  using (device_id);

-- name: devices
-- params: 1 device ids; row: device id, then as all_devices
select d.device_id, convert_to(common_name, 'UTF8') as name, convert_to(concat_ws(E'\t', left(status, 1) || type, case when d.device_id <> common_name then d.device_id else '' end,
         coalesce(extract(epoch from expires_at)::float8::text, ''), case when attributes <> '{}' then attributes::text else '' end,
         coalesce(own.rules, ''), coalesce(extract(epoch from h.until)::float8::text, '')), 'UTF8') as record,
       case when d.device_id <> common_name then convert_to(d.device_id, 'UTF8') end as other_id
from device d
left join device_hold h on h.device_id = d.device_id
left join lateral (select json_agg(json_build_array(r.id, r.effect, r.action, r.topic, r.exchange) order by r.id)::text as rules from topic_rule r where r.device_id = d.device_id) own on true
where d.device_id = any ($1::text[]);

-- name: device_ids_by_common_name
select device_id from device where common_name = any ($1::text[]);

-- name: all_accounts
select name, convert_to(json_build_object('name', name, 'login', login, 'password_hash', password_hash, 'tags', tags, 'vhosts', vhosts,
         'networks', networks::text[], 'client_ids', client_ids, 'configure', configure, 'write', write, 'read', read,
         'unchecked_dead_lettering', unchecked_dead_lettering,
         'rules', (select json_agg(json_build_array(r.id, r.effect, r.action, r.topic, r.exchange) order by r.id) from topic_rule r where r.account = a.name))::text, 'UTF8') as record
from account a;

-- name: accounts
select name, convert_to(json_build_object('name', name, 'login', login, 'password_hash', password_hash, 'tags', tags, 'vhosts', vhosts,
         'networks', networks::text[], 'client_ids', client_ids, 'configure', configure, 'write', write, 'read', read,
         'unchecked_dead_lettering', unchecked_dead_lettering,
         'rules', (select json_agg(json_build_array(r.id, r.effect, r.action, r.topic, r.exchange) order by r.id) from topic_rule r where r.account = a.name))::text, 'UTF8') as record
from account a where name = any ($1::text[]);

-- name: sizes^
select (select count(*) from device) as device, (select count(*) from device_type) as device_type,
       (select count(*) from account) as account;
