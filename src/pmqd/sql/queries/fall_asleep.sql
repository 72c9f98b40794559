update {schema}.leader set awake_until = '-infinity'
