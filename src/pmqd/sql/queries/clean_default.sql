-- A page of the default partition: what ended long enough ago is deleted, and the place is kept for the next call.
with page as materialized (
  select d.id, d.status, coalesce(d.completed_at, d.failed_at, d.cancelled_at) as ended
  from {schema}.jobs_default d cross join {schema}.retention r
  where d.id > r.cursor order by d.id limit %(batch)s
), gone as (
  delete from {schema}.jobs_default d
  where d.id = any(array(
      select p.id from page p
      where (p.status = 'completed' and p.ended <= now() - %(completed_days)s * interval '1 day')
         or (p.status in ('failed', 'cancelled') and p.ended <= now() - %(failed_days)s * interval '1 day')))
    and d.status in ('completed', 'failed', 'cancelled')  -- not one that was replayed meanwhile
  returning 1
)
update {schema}.retention
set cursor = coalesce((select p.id from page p order by p.id desc limit 1), '00000000-0000-0000-0000-000000000000')
returning (select count(*)::int from gone), (select count(*)::int from page)
