-- A row for every queue that appears, and the settings of those that have some. Nothing is written that is so already.
insert into {schema}.job_queues as q (name, default_priority, max_attempts, timeout_seconds, retry_base_seconds, retry_max_seconds)
select * from unnest(%(names)s::text[], %(priorities)s::int[], %(attempts)s::int[], %(timeouts)s::float8[], %(bases)s::float8[],
                     %(maxima)s::float8[]) as given(name, priority, attempts, timeout, base, most)
order by name
on conflict (name) do update
set default_priority = excluded.default_priority, max_attempts = excluded.max_attempts, timeout_seconds = excluded.timeout_seconds,
    retry_base_seconds = excluded.retry_base_seconds, retry_max_seconds = excluded.retry_max_seconds, updated_at = now()
where q.name = any(%(configured)s::text[])
  and (q.default_priority, q.max_attempts, q.timeout_seconds, q.retry_base_seconds, q.retry_max_seconds) is distinct from
      (excluded.default_priority, excluded.max_attempts, excluded.timeout_seconds, excluded.retry_base_seconds, excluded.retry_max_seconds)
