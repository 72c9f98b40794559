-- Of a month that is over: the jobs that must outlive it, because they are not finished or have not been so for long enough.
select j.id from {schema}.jobs j
where j.id >= {schema}.id_at(%(month)s::date::timestamp at time zone 'utc')
  and j.id < {schema}.id_at((%(month)s::date + interval '1 month')::timestamp at time zone 'utc')
  and (j.ready or j.status = 'running'
       or j.completed_at > now() - %(completed_days)s * interval '1 day'
       or coalesce(j.failed_at, j.cancelled_at) > now() - %(failed_days)s * interval '1 day')
limit %(limit)s
