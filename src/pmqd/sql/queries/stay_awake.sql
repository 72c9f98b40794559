update {schema}.leader set awake_until = now() + %(seconds)s * interval '1 s' where term = %(term)s
