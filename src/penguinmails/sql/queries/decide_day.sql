update penguinmails.warmup_days
   set sent = %(sent)s, bounced = %(bounced)s, complained = %(complained)s, received = %(received)s, engaged = %(engaged)s,
       decision = %(decision)s, reason = %(reason)s
 where account = %(account)s and day = %(day)s
