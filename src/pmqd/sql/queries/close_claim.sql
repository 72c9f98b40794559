delete from {schema}.claims where token = %(token)s
