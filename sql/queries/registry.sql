-- The registry as the copy in memory reads it.

-- name: lock_registry!
-- Before the first SELECT of a reader: a table rewrite or TRUNCATE that committed after the snapshot was taken
-- would look like an empty table.
lock table device_type, client_id_move, device, device_hold, account, topic_rule, change, change_floor, incarnation in access share mode;

-- name: locked_by
-- Who keeps lock_registry waiting: who has a table for itself alone or waits for that, and who does not let it.
-- row: table, exclusive pid, since when it waits, and of the session that everybody waits for: pid, role, application, since, state
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
-- Where the reader stands. params: 1 names of the watched tables that the reader knows; row: snapshot text, the server's clock, floor text, incarnation text or null, epoch text,
-- triggers bigint, oldest program text
select pg_current_snapshot()::text as snapshot, clock_timestamp() as at,
       (select floor::text from change_floor) as floor,
       (select id::text from incarnation) as incarnation,
       registry_epoch() as epoch,
       (select count(*) from pg_trigger where tgfoid = 'public.change_note'::regproc and tgenabled = 'A' and tgrelid = any ($1::text[]::regclass[])
          and tgname in ('change_i', 'change_u', 'change_d', 'change_t')) as triggers,
       registry_oldest_program() as oldest_program;

-- name: server^
-- Asked before anything is locked that a newer schema may not have.
select pg_is_in_recovery() as standby, registry_oldest_program() as oldest_program;

-- name: changes_since
-- What the mark's snapshot could not see. params: 1 xmax text, 2 xip text[]; uses change_txid
select distinct entity, key from change where txid >= $1::text::xid8 or txid = any ($2::text[]::xid8[]);

-- name: renew_incarnation$
select incarnation_renew()::text;

-- name: prune$
-- params: 1 seconds
select change_prune(make_interval(secs => $1));

-- Rows as the store keeps them: authbackend/registry/records.py tells the form.

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
-- row: common name, record, device id where it is another, all bytea
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
