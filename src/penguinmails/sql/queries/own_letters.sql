-- Which of these deliveries went out over the account.
select id from penguinmails.deliveries
 where id = any(%(ids)s) and coalesce(account, 'default') = %(account)s
