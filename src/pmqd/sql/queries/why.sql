-- What a queue's state says about its waiting jobs, and the time it is.
select exists (select from {schema}.job_queues q where q.name = %(queue_name)s and not q.is_active) as paused,
       exists (select from {schema}.instances i cross join {schema}.ticker t
               where %(queue_name)s = any(i.queues) and t.tick - i.lease_tick <= 30) as served,
       now() as now
