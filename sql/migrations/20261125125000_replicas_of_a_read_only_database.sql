-- migrate:up

-- A replica that follows a database which it cannot write to keeps its word with an advisory lock for as long as it is connected.
create or replace view replica_state as
select r.*,
       case when stopped_at is not null and not comes_back and not connected then 'stopped'
            when counts_until < clock_timestamp() and not connected then 'gone'
            when stopped_at is not null and not connected then 'stopped'
            when snapshot is null then 'starting'
            when seen_at < clock_timestamp() - interval '10 s' then 'silent'
            else 'live' end as state,
       connected or ((stopped_at is null or comes_back) and counts_until >= clock_timestamp()) as may_answer,
       counts_until
from replica r
cross join lateral (select greatest(introduced_at, confirmed_at) as seen_at) as s
cross join lateral (select seen_at + make_interval(secs => longest_staleness_s + 5) as counts_until) as u
cross join lateral (select exists (
    select from pg_locks
    where locktype = 'advisory' and classid = 724005 and objsubid = 2 and granted
      and objid::bigint = hashtext(r.id::text)::bigint & 4294967295
      and database = (select oid from pg_database where datname = current_database())) as connected) as c;

-- migrate:down
