-- A page of log rows outside any month; by ctid: this is one table, not a partitioned one.
with gone as (
  delete from {schema}.job_logs_default
  where ctid = any(array(
    select l.ctid from {schema}.job_logs_default l where l.created < now() - %(log_days)s * interval '1 day' limit %(batch)s))
  returning 1
)
select count(*)::int, count(*)::int from gone
