-- The registry as the copy in memory reads it.

-- name: lock_registry!
-- Before the first SELECT of a reader: a table rewrite or TRUNCATE that committed after the snapshot was taken
-- would look like an empty table.
lock table device_type, device, account, topic_rule, change, change_floor, incarnation in access share mode;

-- name: position^
-- Where the reader stands. row: snapshot text, floor text, incarnation text or null, epoch text, triggers bigint
select pg_current_snapshot()::text as snapshot,
       (select floor::text from change_floor) as floor,
       (select id::text from incarnation) as incarnation,
       concat_ws('/', (select system_identifier from pg_control_system()),
         (select oid from pg_database where datname = current_database()),
         left(pg_walfile_name(pg_current_wal_lsn()), 8), pg_postmaster_start_time(),
         'public.change'::regclass::oid, 'public.device_type'::regclass::oid, 'public.device'::regclass::oid,
         'public.account'::regclass::oid, 'public.topic_rule'::regclass::oid) as epoch,
       (select count(*) from pg_trigger where tgfoid = 'public.change_note'::regproc and tgenabled = 'A') as triggers;

-- name: changes_since
-- What the mark's snapshot could not see. params: 1 xmax text, 2 xip text[]; uses change_txid
select distinct entity, key from change where txid >= $1::text::xid8 or txid = any ($2::text[]::xid8[]);

-- name: renew_incarnation$
select incarnation_renew()::text;

-- name: prune$
-- params: 1 seconds
select change_prune(make_interval(secs => $1));

-- name: all_device_types
select name, client_ids, vhosts, networks::text[] as networks from device_type;

-- name: device_types
select name, client_ids, vhosts, networks::text[] as networks from device_type where name = any ($1::text[]);

-- name: all_devices
select device_id, common_name, type, status, attributes::text as attributes,
       extract(epoch from expires_at)::float8 as expires_at
from device;

-- name: devices
select device_id, common_name, type, status, attributes::text as attributes,
       extract(epoch from expires_at)::float8 as expires_at
from device where device_id = any ($1::text[]);

-- name: device_ids_by_common_name
select device_id from device where common_name = any ($1::text[]);

-- name: all_accounts
select name, login, password_hash, tags, vhosts, networks::text[] as networks, client_ids, configure, write, read,
       unchecked_dead_lettering
from account;

-- name: accounts
select name, login, password_hash, tags, vhosts, networks::text[] as networks, client_ids, configure, write, read,
       unchecked_dead_lettering
from account where name = any ($1::text[]);

-- name: all_rules
select id, device_type, device_id, account, effect, action, topic, exchange from topic_rule;

-- name: rules_of
-- params: 1 device types, 2 device ids, 3 accounts
select id, device_type, device_id, account, effect, action, topic, exchange from topic_rule
where device_type = any ($1::text[]) or device_id = any ($2::text[]) or account = any ($3::text[]);

-- name: sizes^
select (select count(*) from device) as device, (select count(*) from device_type) as device_type,
       (select count(*) from account) as account;
