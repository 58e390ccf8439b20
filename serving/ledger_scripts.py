"""The ledger's books in Redis, and the Lua scripts that alone change them; each script is one atomic step.

Keys (all below `signalbox:`):

- `ledger:budget:<policy>:<holder>:<window in µs>`, hash: `index` of the window it is about, and for `usd` (nano-USD),
  `tokens` and `requests` what is spent, with `held_` before it what is reserved. A new window begins with zeros.
- `ledger:flow:<policy>:<holder>`, hash: `inflight`, and of `requests` and `tokens` a minute the GCRA's theoretical
  arrival time, µs since 1970.
- `ledger:held:<owner>`, `ledger:sent:<owner>`, `ledger:swept:<owner>`, hashes by reservation: what is reserved, what
  is noted as sent, and what a sweeper charged in the owner's place.
- `ledger:owners`, sorted set: when each gateway was last heard of, µs.
- `ledger:ends`, sorted set: when a key may be removed, µs. The books have no time to live of Redis's: keys that have
  one are what the embedded Valkey evicts when the cache fills its memory, and a budget would begin anew.

Amounts are whole numbers and exact up to 2^53: 9 million USD a window. Time is the server's. The scripts name keys
that they find in a reservation, so the server must not be a Redis Cluster.
"""

from __future__ import annotations

OWNERS = "ledger:owners"
ENDS = "ledger:ends"

_HELPERS = """
local function now_us() local time = redis.call('TIME') return time[1] * 1000000 + time[2] end
local function whole(number) return string.format('%.0f', number + 0) end  -- never '-0'
local HOUR = 3600000000
"""

# Takes all that a request may need from all its accounts, or nothing.
# KEYS: held, owners, ends, then budget and flow of each account.
# ARGV: reservation, owner, nano-USD, tokens, requests, whether to take it unasked ('1'), then for each account
# window in µs (0: no budget), limits in nano-USD, tokens and requests (-1: none), µs for a request and for a token
# (0: no rate), burst in µs, most in flight (0: any number).
# Returns {'ok'}, or of the gravest obstacle {what, account from 1, ...}:
# {'spent' | 'held', i, unit, limit, spent, held, end of the window in µs}, {'rate', i, unit, µs to wait},
# {'inflight', i, limit}.
RESERVE = (
    _HELPERS
    + """
local UNITS = {'usd', 'tokens', 'requests'}
local GRAVITY = {spent = 4, rate = 3, inflight = 2, held = 1}
local id, owner, unasked = ARGV[1], ARGV[2], ARGV[6] == '1'
local most = {tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])}
if redis.call('HEXISTS', KEYS[1], id) == 1 then return {'ok'} end
local now = now_us()
local obstacle = nil
local function refuse(found)
  if not obstacle or GRAVITY[found[1]] > GRAVITY[obstacle[1]] then obstacle = found end
end

local lines = {}
for i = 1, (#KEYS - 3) / 2 do
  local budget, flow = KEYS[2 + 2 * i], KEYS[3 + 2 * i]
  local at = 6 + (i - 1) * 8
  local window = tonumber(ARGV[at + 1])
  local line = {budget = budget, flow = flow, index = -1, fresh = false}
  if window > 0 then
    local book = redis.call('HMGET', budget, 'index', 'usd', 'tokens', 'requests',
                            'held_usd', 'held_tokens', 'held_requests')
    local stored = tonumber(book[1] or -1)
    line.index = math.max(math.floor(now / window), stored)  -- the clock may have been set back
    line.fresh = stored ~= line.index
    line.ends = (line.index + 1) * window
    for unit = 1, 3 do
      local limit = tonumber(ARGV[at + 1 + unit])
      local spent = line.fresh and 0 or tonumber(book[1 + unit] or 0)
      local held = line.fresh and 0 or tonumber(book[4 + unit] or 0)
      local bound = limit * (1 + 1e-9)
      if limit >= 0 and spent + held + most[unit] > bound then
        refuse({spent + most[unit] > bound and 'spent' or 'held', i, UNITS[unit],
                whole(limit), whole(spent), whole(held), whole(line.ends)})
      end
    end
  end
  local state = redis.call('HMGET', flow, 'requests', 'tokens', 'inflight', 'pace_requests', 'pace_tokens')
  local burst = tonumber(ARGV[at + 7])
  line.until_us, line.per = {0, 0}, {tonumber(ARGV[at + 5]), tonumber(ARGV[at + 6])}
  for k, amount in ipairs({most[3], most[2]}) do
    local cost = line.per[k] * amount
    if cost > 0 then
      local owed, pace = math.max(tonumber(state[k] or 0) - now, 0), tonumber(state[3 + k] or 0)
      if pace > 0 then owed = owed * line.per[k] / pace end  -- a debt of requests, whatever they cost when it was made
      local arrival = now + owed + cost
      -- What is larger than the burst passes when nothing is owed, and the next ones wait for it.
      local wait = arrival - now - math.max(burst, cost)
      if wait > 0 then refuse({'rate', i, k == 1 and 'requests' or 'tokens', whole(wait)}) end
      line.until_us[k] = arrival
    end
  end
  local limit = tonumber(ARGV[at + 8])
  if limit > 0 and tonumber(state[3] or 0) >= limit then refuse({'inflight', i, whole(limit)}) end
  lines[i] = line
end
if obstacle and not unasked then return obstacle end

local record = {most = most, lines = {}}
for i, line in ipairs(lines) do
  if line.index >= 0 then
    if line.fresh then
      redis.call('DEL', line.budget)
      redis.call('HSET', line.budget, 'index', whole(line.index))
    end
    for unit = 1, 3 do redis.call('HINCRBY', line.budget, 'held_' .. UNITS[unit], whole(most[unit])) end
    redis.call('ZADD', KEYS[3], whole(line.ends), line.budget)
  end
  for k, name in ipairs({'requests', 'tokens'}) do
    if line.until_us[k] > 0 then
      redis.call('HSET', line.flow, name, whole(line.until_us[k]), 'pace_' .. name, string.format('%.17g', line.per[k]))
    end
  end
  redis.call('HINCRBY', line.flow, 'inflight', 1)
  redis.call('ZADD', KEYS[3], whole(math.max(now, line.until_us[1], line.until_us[2]) + HOUR), line.flow)
  record.lines[i] = {line.budget, line.index, line.flow, line.per, line.until_us}
end
redis.call('HSET', KEYS[1], id, cmsgpack.pack(record))
redis.call('ZADD', KEYS[2], whole(now), owner)
return {'ok'}
"""
)

# `correct` puts the books right by what was charged so far and what is to be: for an open reservation what it holds
# is given back as well. A budget whose window is over is left alone.
_CORRECT = (
    _HELPERS
    + """
local function pace(flow, field, per, reserved, actual, until_us, now)
  local unused = (reserved - actual) * per
  if unused == 0 then return end
  local arrival = tonumber(redis.call('HGET', flow, field) or 0)
  if unused > 0 then
    -- What time has paid off since is not given back a second time.
    arrival = arrival - math.min(unused, math.max(0, until_us - now))
  else
    arrival = math.max(arrival, now) - unused
  end
  redis.call('HSET', flow, field, whole(arrival))
end

local function correct(record, before, actual, open)
  local now = now_us()
  for _, line in ipairs(record.lines) do
    local budget, index, flow, per, until_us = unpack(line)
    if index >= 0 and tonumber(redis.call('HGET', budget, 'index') or -1) == index then
      for unit, name in ipairs({'usd', 'tokens', 'requests'}) do
        if open then
          redis.call('HINCRBY', budget, 'held_' .. name, whole(-record.most[unit]))
          redis.call('HINCRBY', budget, name, whole(actual[unit]))
        else
          redis.call('HINCRBY', budget, name, whole(actual[unit] - before[unit]))
        end
      end
    end
    if redis.call('EXISTS', flow) == 1 then
      if open then redis.call('HINCRBY', flow, 'inflight', -1) end
      pace(flow, 'requests', per[1], before[3], actual[3], open and until_us[1] or 0, now)
      pace(flow, 'tokens', per[2], before[2], actual[2], open and until_us[2] or 0, now)
    end
  end
end
"""
)

# Charges what a request came to, once. Where a sweeper took its gateway for dead, its charge is corrected.
# KEYS: held, sent, swept. ARGV: reservation, nano-USD, tokens, requests. Returns whether there was anything to do.
SETTLE = (
    _CORRECT
    + """
local id, actual = ARGV[1], {tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])}
local packed = redis.call('HGET', KEYS[1], id)
if packed then
  local record = cmsgpack.unpack(packed)
  redis.call('HDEL', KEYS[1], id)
  redis.call('HDEL', KEYS[2], id)
  correct(record, record.most, actual, true)
  return 1
end
packed = redis.call('HGET', KEYS[3], id)
if not packed then return 0 end
local swept = cmsgpack.unpack(packed)
redis.call('HDEL', KEYS[3], id)
correct(swept.record, swept.charged, actual, false)
return 1
"""
)

# Notes what has been sent so far, for sweepers. KEYS: held, sent.
# ARGV: reservation, nano-USD, tokens, requests; again for each. An older note never replaces a newer one.
NOTE = """
for i = 1, #ARGV, 4 do
  if redis.call('HEXISTS', KEYS[1], ARGV[i]) == 1 then
    local noted = redis.call('HGET', KEYS[2], ARGV[i])
    local sent = noted and cmsgpack.unpack(noted) or {0, 0, 0}
    for unit = 1, 3 do sent[unit] = math.max(sent[unit], tonumber(ARGV[i + unit])) end
    redis.call('HSET', KEYS[2], ARGV[i], cmsgpack.pack(sent))
  end
end
"""

# Settles reservations that nobody will settle, by what is noted as sent. KEYS: held, sent, swept, owners, ends.
# ARGV: owner, µs of silence after which it counts as dead (-1: do not ask), most reservations, then the
# reservations, or none for all of the owner's. Returns the reservations that were settled.
SWEEP = (
    _CORRECT
    + """
local owner, silence, most = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local now = now_us()
if silence >= 0 then
  local heard = tonumber(redis.call('ZSCORE', KEYS[4], owner) or 0)
  if now - heard < silence then return {} end
end
local ids = {}
for i = 4, #ARGV do ids[#ids + 1] = ARGV[i] end
if #ARGV == 3 then ids = redis.call('HKEYS', KEYS[1]) end
local done = {}
for _, id in ipairs(ids) do
  local packed = redis.call('HGET', KEYS[1], id)
  if packed and #done < most then
    local record = cmsgpack.unpack(packed)
    local noted = redis.call('HGET', KEYS[2], id)
    local sent = noted and cmsgpack.unpack(noted) or {0, 0, 0}
    redis.call('HDEL', KEYS[1], id)
    redis.call('HDEL', KEYS[2], id)
    correct(record, record.most, sent, true)
    redis.call('HSET', KEYS[3], id, cmsgpack.pack({record = record, charged = sent}))
    redis.call('ZADD', KEYS[5], whole(now + HOUR), KEYS[3])
    done[#done + 1] = id
  end
end
if silence >= 0 and redis.call('EXISTS', KEYS[1]) == 0 then redis.call('ZREM', KEYS[4], owner) end
return done
"""
)

# A gateway's sign of life, and the removal of books that have ended. KEYS: owners, ends, held.
# ARGV: owner, µs of silence after which others count as dead, most books to remove.
# Returns {owners that seem dead, our own reservations}.
BEAT = (
    _HELPERS
    + """
local now = now_us()
redis.call('ZADD', KEYS[1], whole(now), ARGV[1])
for _, key in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', whole(now), 'LIMIT', 0, ARGV[3])) do
  if tonumber(redis.call('HGET', key, 'inflight') or 0) > 0 then
    redis.call('ZADD', KEYS[2], whole(now + HOUR), key)
  else
    redis.call('DEL', key)
    redis.call('ZREM', KEYS[2], key)
  end
end
return {redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', whole(now - tonumber(ARGV[2])), 'LIMIT', 0, 64),
        redis.call('HKEYS', KEYS[3])}
"""
)

# KEYS: budget, flow. Returns {now in µs, the budget's hash, the flow's}.
READ = (
    _HELPERS
    + """
return {whole(now_us()), redis.call('HGETALL', KEYS[1]), redis.call('HGETALL', KEYS[2])}
"""
)
