-- The lock belongs to the session: it ends with the connection. The new term ends whatever the last leader still has under way.
update {schema}.leader set term = term + 1, holder = %(holder)s
where pg_try_advisory_lock(hashtextextended(%(lock)s, 0))
returning term
