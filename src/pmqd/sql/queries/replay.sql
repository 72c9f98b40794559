-- A batch of one queue's failed jobs starts over, oldest failure first. The last row returned is where the next batch begins.
with chosen as materialized (
  select j.id, j.failed_at, j.kind from {schema}.jobs j
  where j.queue_name = %(queue_name)s and j.failed_at is not null
    and j.failed_at >= %(after_at)s::timestamptz and j.failed_at <= %(until)s::timestamptz
    and (%(after_id)s::uuid is null or (j.failed_at, j.id) > (%(after_at)s::timestamptz, %(after_id)s::uuid))
  order by j.failed_at, j.id limit %(batch)s
), locked as materialized (
  select j.id from {schema}.jobs j
  where j.id = any(array(select c.id from chosen c where %(kind)s::text is null or c.kind = %(kind)s::text limit %(most)s))
    and j.status = 'failed'
  order by j.id for update
), again as (
  update {schema}.jobs j
  set status = 'queued', ready = true, attempt_count = 0, interruptions = 0, alone = false, run_at = now(), updated_at = now(),
      started_at = null, failed_at = null, last_error_message = null, claim_token = null
  where j.id = any(array(select l.id from locked l)) and j.status = 'failed'
  returning j.id
)
select (select count(*)::int from again), c.failed_at, c.id, (select {schema}.wake() where exists (select from again))
from (select null) as one left join (select * from chosen order by failed_at desc, id desc limit 1) c on true
