update {schema}.leader set awake_until = '-infinity' where term = %(term)s
