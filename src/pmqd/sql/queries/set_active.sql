-- Pauses or resumes a queue; no row: there is no such queue.
update {schema}.job_queues
set is_active = %(active)s, paused_at = case when %(active)s then null else coalesce(paused_at, now()) end, updated_at = now()
where name = %(queue_name)s
returning name, (select {schema}.wake() where %(active)s)
