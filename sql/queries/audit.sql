-- Export of the audit trail.

-- name: exported
-- Ordered by id, which is the order in which statements wrote the rows.
-- params: 1 written at or after, 2 written before, 3 entities text[], 4 key, 5 actor or role, 6 claimed_by, 7 operation,
--   8 written by this transaction or a later one; null: any
select id, at, version::text as version, role::text as role, actor, claimed_by, application, host(address) as address,
       operation, entity, key, before::text as before, after::text as after
from audit
where ($1::timestamptz is null or at >= $1) and ($2::timestamptz is null or at < $2)
  and ($3::text[] is null or entity = any ($3)) and ($4::text is null or key = $4)
  and ($5::text is null or actor = $5 or role::text = $5) and ($6::text is null or claimed_by = $6)
  and ($7::text is null or operation = $7) and ($8::text is null or version >= $8::text::xid8)
order by id;

-- name: export_moment^
-- row: the time, and the oldest transaction that may still be open: all rows of older ones are visible
select clock_timestamp() as as_of, pg_snapshot_xmin(pg_current_snapshot())::text as next_version;

-- name: entities_without_rows
-- params: 1 entities text[]
select asked from unnest($1::text[]) as asked where not exists (select from audit where entity = asked) order by 1;
