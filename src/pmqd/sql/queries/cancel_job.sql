-- A waiting job is cancelled; a running one gets a request, which its owner sees.
with asked as (
  update {schema}.jobs j
  set status = case when j.status = 'running' then 'running' else 'cancelled' end,
      ready = false,
      cancelled_at = case when j.status = 'running' then null else now() end,
      cancel_requested = j.status = 'running',
      updated_at = now()
  where j.id = %(id)s and j.status in ('queued', 'migrated_to_redis', 'running')
  returning j.id
)
select exists (select from asked), (select j.status from {schema}.jobs j where j.id = %(id)s)
