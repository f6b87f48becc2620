-- migrate:up

-- A row stands for one start of a replica, no longer for one folder: two replicas can run from copies of one folder, and each
-- must be waited for. Replicas of the previous version write no folder; their id is the folder's.
alter table replica add column folder uuid; -- the id kept in registry.snapshot_dir; null without one

create or replace view replica_state as
select r.id, r.name, r.program_version, r.workers, r.longest_staleness_s, r.introduced_at, r.epoch, r.incarnation,
       r.snapshot, r.confirmed_at, r.stopped_at, r.comes_back, d.state,
       (stopped_at is null or comes_back) and counts_until >= clock_timestamp() as may_answer,
       counts_until,
       r.folder,
       -- How many others run from a folder with this id, as far as was heard in the last 10 s.
       case when heard then count(*) filter (where heard) over (partition by coalesce(folder, id)) - 1 else 0 end as twins
from replica r
cross join lateral (select greatest(introduced_at, confirmed_at) as seen_at) as s
cross join lateral (select seen_at + make_interval(secs => longest_staleness_s + 5) as counts_until) as u
cross join lateral (select case when stopped_at is not null and not comes_back then 'stopped'
            when counts_until < clock_timestamp() then 'gone'
            when stopped_at is not null then 'stopped'
            when snapshot is null then 'starting'
            when seen_at < clock_timestamp() - interval '10 s' then 'silent'
            else 'live' end as state) as d
cross join lateral (select stopped_at is null and seen_at >= clock_timestamp() - interval '10 s' as heard) as h;

-- migrate:down
