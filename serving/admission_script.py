"""The steps of `policies/admission.py` as a Lua script: one queue for all gateways, each change one atomic step.

The state of an expert's queue is one MessagePack value. Times are the store's clock, in seconds. Events of the calling
gateway's tickets are returned, those of others put into their gateways' mailboxes.
"""

from __future__ import annotations

# Keys: the state, the prefix of the mailboxes. Arguments: operation, expert, capacity, max_queued, gateway, then
#   arrive: id, tenant, weight, priority, slack (seconds from now to the deadline), seconds until it is due, service,
#           places
#   leave:  id, 1 if completed
#   sync:   ids
# Returns {now, events, ids that run, ids that wait}; events are {id, reason or '', retry_after}, numbers as strings.
ADMISSION = """
local GONE, GRACE, RATE, MAX_SHARES, STATE_TTL, MAIL_TTL = 5, 2, 0.05, 4096, 3600, 30
local op, expert, capacity, max_queued, gateway = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1000000

local raw = redis.call('GET', KEYS[1])
local state = raw and cmsgpack.unpack(raw) or {running = {}, waiting = {}, shares = {}, seen = {}, ratio = 1}
local running, waiting, shares, seen, ratio = state.running, state.waiting, state.shares, state.seen, state.ratio
local events = {}
local function event(id, reason, retry) events[#events + 1] = {id, reason, retry} end
local function owner(id) return string.sub(id, 1, string.find(id, '/', 1, true) - 1) end

local function keep(list, wanted)
  local kept = {}
  for _, t in ipairs(list) do if wanted(t) then kept[#kept + 1] = t end end
  return kept
end

local function cost(t) return t.service * t.places / t.weight end

local function stands_before(s, t)
  if s.due ~= t.due then return s.due < t.due end
  if s.arrived ~= t.arrived then return s.arrived < t.arrived end
  return s.id < t.id
end

local function ordered(tickets)
  local served, sorted, order = {}, {}, {}
  for i, t in ipairs(tickets) do sorted[i] = t; served[t.tenant] = shares[t.tenant] or 0 end
  table.sort(sorted, function(s, t)
    if s.priority ~= t.priority then return s.priority > t.priority end
    return stands_before(s, t)
  end)
  local i = 1
  while i <= #sorted do
    local priority, queues, heads, left = sorted[i].priority, {}, {}, 0
    while i <= #sorted and sorted[i].priority == priority do
      local t = sorted[i]
      if not queues[t.tenant] then queues[t.tenant] = {}; heads[t.tenant] = 1 end
      table.insert(queues[t.tenant], t)
      left, i = left + 1, i + 1
    end
    while left > 0 do
      local best, name
      for tenant, queue in pairs(queues) do
        local head = queue[heads[tenant]]
        if head and (not best or served[tenant] < served[name]
            or (served[tenant] == served[name] and stands_before(head, best))) then
          best, name = head, tenant
        end
      end
      heads[name] = heads[name] + 1
      served[name] = served[name] + cost(best)
      order[#order + 1] = best
      left = left - 1
    end
  end
  return order
end

local function push(heap, value)
  local i = #heap + 1
  heap[i] = value
  while i > 1 do
    local parent = math.floor(i / 2)
    if heap[parent] <= heap[i] then break end
    heap[parent], heap[i] = heap[i], heap[parent]
    i = parent
  end
end

local function pop(heap)
  local top, last = heap[1], table.remove(heap)
  if #heap == 0 then return top end
  heap[1] = last
  local i = 1
  while true do
    local child = 2 * i
    if child > #heap then break end
    if child < #heap and heap[child + 1] < heap[child] then child = child + 1 end
    if heap[i] <= heap[child] then break end
    heap[i], heap[child] = heap[child], heap[i]
    i = child
  end
  return top
end

local function ends()
  local list = {}
  for _, t in ipairs(running) do
    for _ = 1, t.places do list[#list + 1] = math.max(now, t.started + t.service * ratio) end
  end
  table.sort(list, function(a, b) return a > b end)
  local heap = {}
  for i = 1, capacity do push(heap, list[i] or now) end
  return heap
end

local function take(heap, ticket, latest)
  local taken = {}
  for i = 1, math.min(ticket.places, #heap) do taken[i] = pop(heap) end
  local start = taken[#taken]
  local finish = start + ticket.service * ratio
  for _, free in ipairs(taken) do push(heap, start <= latest and finish or free) end
  return start
end

local function forecast(ticket)
  local heap = ends()
  if #heap == 0 then return math.huge end
  local all = {}
  for i, t in ipairs(waiting) do all[i] = t end
  all[#all + 1] = ticket
  for _, t in ipairs(ordered(all)) do
    local start = take(heap, t, math.huge)
    if t == ticket then return start end
  end
end

local function remove(list, ticket) return keep(list, function(t) return t ~= ticket end) end

local function count(ticket)
  shares[ticket.tenant] = (shares[ticket.tenant] or 0) + cost(ticket)
  local size = 0
  for _ in pairs(shares) do size = size + 1 end
  if size > MAX_SHARES then
    local present = {}
    for _, t in ipairs(waiting) do present[t.tenant] = shares[t.tenant] end
    for _, t in ipairs(running) do present[t.tenant] = shares[t.tenant] end
    shares = present
  end
end

local function advance()
  local order, free, first = ordered(waiting), capacity, 1
  for _, t in ipairs(running) do free = free - t.places end
  while order[1] and free > 0 and free >= math.min(order[1].places, capacity) do
    local ticket = order[1]
    waiting = remove(waiting, ticket)
    if ticket.deadline < now then
      event(ticket.id, 'shed_deadline', ticket.service * ratio)
    else
      ticket.started = now
      running[#running + 1] = ticket
      free = free - ticket.places
      count(ticket)
      event(ticket.id, '', 0)
    end
    order = ordered(waiting)
  end
  if #order == 0 then return end
  local heap = ends()
  local highest = order[1].priority
  for _, ticket in ipairs(order) do
    local start = #heap > 0 and take(heap, ticket, ticket.deadline) or now
    if start > ticket.deadline then
      waiting = remove(waiting, ticket)
      event(ticket.id, highest > ticket.priority and 'shed_priority' or 'shed_deadline', start - ticket.deadline)
    end
  end
end

local function find(list, id)
  for _, t in ipairs(list) do if t.id == id then return t end end
end

seen[gateway] = now
local dead, some = {}, false
for name, at in pairs(seen) do if now - at > GONE then dead[name] = true; some = true end end
if some then
  for name in pairs(dead) do seen[name] = nil end
  local function lives(t) return not dead[owner(t.id)] end
  running, waiting = keep(running, lives), keep(waiting, lives)
end

if op == 'arrive' then
  local ticket = {id = ARGV[6], tenant = ARGV[7], weight = tonumber(ARGV[8]), priority = tonumber(ARGV[9]),
    arrived = now, deadline = now + tonumber(ARGV[10]), due = now + tonumber(ARGV[11]), service = tonumber(ARGV[12]),
    places = tonumber(ARGV[13]), started = 0}
  advance()
  if find(running, ticket.id) then
    event(ticket.id, '', 0)
  elseif not find(waiting, ticket.id) then
    if #waiting == 0 and #running == 0 then shares = {} end
    local least = math.huge
    for _, t in ipairs(waiting) do least = math.min(least, shares[t.tenant] or 0) end
    for _, t in ipairs(running) do least = math.min(least, shares[t.tenant] or 0) end
    if least == math.huge then least = 0 end
    shares[ticket.tenant] = math.max(shares[ticket.tenant] or 0, least)
    waiting[#waiting + 1] = ticket
    local free, equals = capacity, {}
    for _, t in ipairs(running) do free = free - t.places end
    for _, t in ipairs(waiting) do if t.priority == ticket.priority then equals[#equals + 1] = t end end
    if #equals > max_queued and free <= 0 then
      local order = ordered(equals)
      local last = order[#order]
      waiting = remove(waiting, last)
      event(last.id, 'queue_full', forecast(last) - now)
    end
    advance()
  end
elseif op == 'leave' then
  local ticket = find(running, ARGV[6])
  if ticket then
    running = remove(running, ticket)
    if ARGV[7] == '1' and ticket.service > 0 then
      local actual = math.min(math.max((now - ticket.started) / ticket.service, 0.05), 20)
      ratio = ratio + RATE * (actual - ratio)
    end
  else
    waiting = keep(waiting, function(t) return t.id ~= ARGV[6] end)
  end
  advance()
elseif op == 'sync' then
  local mine = {}
  for i = 6, #ARGV do mine[ARGV[i]] = true end
  local function stays(t)
    return owner(t.id) ~= gateway or mine[t.id] or now - math.max(t.arrived, t.started) < GRACE
  end
  running, waiting = keep(running, stays), keep(waiting, stays)
  advance()
end

state = {running = running, waiting = waiting, shares = shares, seen = seen, ratio = ratio, capacity = capacity}
redis.call('SET', KEYS[1], cmsgpack.pack(state), 'EX', STATE_TTL)

local told, runs, waits = {}, {}, {}
for _, e in ipairs(events) do
  local name = owner(e[1])
  local row = {e[1], e[2], tostring(math.min(e[3], 3600))}
  if name == gateway then
    told[#told + 1] = row
  else
    local mailbox = KEYS[2] .. name
    redis.call('RPUSH', mailbox, cmsgpack.pack({expert, row[1], row[2], row[3]}))
    redis.call('EXPIRE', mailbox, MAIL_TTL)
  end
end
if op == 'sync' then
  for _, t in ipairs(running) do if owner(t.id) == gateway then runs[#runs + 1] = t.id end end
  for _, t in ipairs(waiting) do if owner(t.id) == gateway then waits[#waits + 1] = t.id end end
end
return {tostring(now), told, runs, waits}
"""
