-- The months that exist (one row of nulls if none does), this month, and the time.
select p.parent, p.month, date_trunc('month', now() at time zone 'utc')::date, now()
from (select) as one left join {schema}.partitions p on true order by p.parent, p.month
