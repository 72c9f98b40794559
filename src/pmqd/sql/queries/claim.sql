-- Claims jobs by their hints: a guarded compare-and-set; a row that is not won is not returned.
-- By value and between the lowest and highest id: so partitions are pruned in a generic plan too. The guard is `status`, not `ready` (the
-- same by a CHECK), which would tempt the planner to the ready index. Paused queues, the lease (five ticks to spare) and the life of PostgreSQL (a
-- promoted standby may lack the last claims: see beat()) are read once.
with won as (
  update {schema}.jobs j
  set status = 'running', ready = false, attempt_count = j.attempt_count + 1, claim_token = %(token)s, worker_id = %(worker_id)s,
      started_at = now(), updated_at = now()
  where j.id = any(%(ids)s::uuid[]) and j.id between %(lowest)s and %(highest)s
    and j.status in ('queued', 'migrated_to_redis') and j.run_at <= now()
    and j.queue_name <> all (array(select q.name::text from {schema}.job_queues q where not q.is_active))
    and exists (
      select from {schema}.instances i, {schema}.ticker t
      where i.id = %(instance_id)s and t.tick - i.lease_tick <= 25 and t.tick >= t.claims_from and t.timeline in (0, {schema}.timeline()))
  returning j.id, j.queue_name, j.kind, j.priority, j.payload, j.attempt_count, j.interruptions, j.max_attempts, j.run_at,
            j.created_at, j.tags, j.alone
), held as (
  insert into {schema}.claims (token, worker_id, instance_id, ids)
  select %(token)s, %(worker_id)s, %(instance_id)s, array_agg(w.id) from won w having count(*) > 0
)
select w.id, w.queue_name::text, w.kind, w.priority, w.payload::text, w.attempt_count, w.interruptions, w.max_attempts,
       date_part('epoch', w.run_at), date_part('epoch', w.created_at), w.tags, w.alone, date_part('epoch', now())
from won w
order by w.priority, w.run_at, w.id
