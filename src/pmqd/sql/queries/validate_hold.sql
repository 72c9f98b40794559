select {schema}.validate_hold(%(parent)s, %(month)s)
