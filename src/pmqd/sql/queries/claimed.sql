-- After a claim whose answer was lost: the jobs that it won after all. One row of claims, then its jobs by key (`offset 0`: in any plan).
select j.id, j.queue_name::text, j.kind, j.priority, j.payload::text, j.attempt_count, j.interruptions, j.max_attempts,
       date_part('epoch', j.run_at), date_part('epoch', j.created_at), j.tags, j.alone, date_part('epoch', now())
from {schema}.claims c
cross join unnest(c.ids) held(id)
cross join lateral (select j.* from {schema}.jobs j where j.id = held.id offset 0) j
where c.token = %(token)s and j.status = 'running' and j.claim_token = c.token
order by j.priority, j.run_at, j.id
