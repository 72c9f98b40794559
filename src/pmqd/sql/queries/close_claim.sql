-- A claim is over, but for jobs of which nothing can be written: these stay in it.
with kept as (
  update {schema}.claims set ids = %(left)s where token = %(token)s and cardinality(%(left)s::uuid[]) > 0
)
delete from {schema}.claims where token = %(token)s and cardinality(%(left)s::uuid[]) = 0
