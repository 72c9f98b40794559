select day, planned from penguinmails.warmup_days
 where account = %(account)s and day < %(day)s and decision is null order by day desc limit 1
