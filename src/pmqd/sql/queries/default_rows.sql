-- How many rows of a month lie in the default partition (counted up to a limit), and how large that is.
select {schema}.count_in_default(%(parent)s, %(month)s, %(most)s),
       pg_relation_size(case %(parent)s when 'jobs' then '{schema}.jobs_default'::regclass else '{schema}.job_logs_default'::regclass end)
