-- The attempts of one job, oldest first.
select l.id, l.job_id, l.status, l.log_message, l.attempt_number, l.worker_id, l.started, l.finished, l.duration, l.created
from {schema}.job_logs l where l.job_id = %(id)s
order by l.created, l.id
limit 1000
