-- SPDX-License-Identifier: Apache-2.0
local loop = require "sm.loop"
local uv = require "luv"

describe("sm.loop", function()
    it("runs tasks side by side and joins their results", function()
        local order = {}
        local a, b = loop.run(function()
            local t1 = loop.spawn(function()
                loop.sleep(0.03)
                order[#order + 1] = "slow"
                return 1
            end)
            local t2 = loop.spawn(function()
                order[#order + 1] = "fast"
                return 2
            end)
            return t1:join(), t2:join()
        end)
        assert.same({ 1, 2 }, { a, b })
        assert.same({ "fast", "slow" }, order)
    end)

    it("waits outside any task by running the loop", function()
        local before = loop.now()
        loop.sleep(0.02)
        assert.is_true(loop.now() - before >= 0.019)
    end)

    it("rethrows a task's error where it is joined, with a traceback", function()
        local ok, err = pcall(loop.run, function()
            local t = loop.spawn(function()
                error("boom")
            end)
            t:join()
        end)
        assert.is_false(ok)
        assert.matches("boom", err)
        assert.matches("traceback", err)
    end)

    it("rethrows the error of a task nobody joins", function()
        local ok, err = pcall(loop.run, function()
            loop.spawn(function()
                error("unseen")
            end)
            loop.sleep(5)
        end)
        assert.is_false(ok)
        assert.matches("unseen", err)
    end)

    it("rethrows an error of a guarded callback instead of exiting", function()
        local ok, err = pcall(loop.run, function()
            local t = uv.new_timer()
            t:start(1, 0, loop.guard(function()
                t:close()
                error("in callback")
            end))
            loop.sleep(5)
        end)
        assert.is_false(ok)
        assert.matches("in callback", err)
    end)

    it("times out and cancels the operation", function()
        local cancelled = false
        local res, why = loop.run(function()
            return loop.await(function()
                return function()
                    cancelled = true
                end
            end, 0.01)
        end)
        assert.is_nil(res)
        assert.equal("timeout", why)
        assert.is_true(cancelled)
    end)

    it("counts a time out from now, however long the caller has blocked before", function()
        loop.sleep(0.001) -- the loop looks at its clock
        os.execute "sleep 0.3"
        local from = loop.now()
        local ok, err = loop.await(function() end, 0.2)
        assert.is_nil(ok)
        assert.equal("timeout", err)
        assert.is_true(loop.now() - from >= 0.19, loop.now() - from)
    end)

    it("cancels a waiting task and closes its <close> variables", function()
        local closed = false
        loop.run(function()
            local t = loop.spawn(function()
                local _ <close> = setmetatable({}, { __close = function()
                    closed = true
                end })
                loop.sleep(60)
            end)
            loop.sleep(0.005)
            t:cancel()
            assert.is_true(t:finished())
        end)
        assert.is_true(closed)
    end)

    it("joins with a timeout", function()
        local res, why
        loop.run(function()
            local t = loop.spawn(loop.sleep, 60)
            res, why = t:join(0.01)
            t:cancel()
        end)
        assert.is_nil(res)
        assert.equal("timeout", why)
    end)

    it("waits in a list for its turn, and leaves it when it gives up", function()
        local list, got, unclaimed = {}, {}, nil
        loop.run(function()
            local function wait(name, timeout)
                return loop.spawn(function()
                    got[name] = loop.wait_in(list, timeout, function(what)
                        unclaimed = what
                    end) or "nothing"
                end)
            end
            local first, second, third = wait "first", wait("second", 0.01), wait "third"
            loop.sleep(0.02)
            assert.equal(2, #list)
            table.remove(list, 1) "a"
            first:join()
            third:cancel()
            assert.same({}, list)
            -- Called, and cancelled before it goes on.
            local fourth = wait "fourth"
            loop.sleep(0.001)
            table.remove(list, 1) "d"
            fourth:cancel()
            second:join()
        end)
        assert.same({ first = "a", second = "nothing" }, got)
        assert.equal("d", unclaimed)
    end)

    it("wakes all of a list", function()
        local list, woken = {}, {}
        loop.run(function()
            local tasks = {}
            for i = 1, 3 do
                tasks[i] = loop.spawn(function()
                    assert.is_true(loop.wait_in(list))
                    woken[#woken + 1] = i
                end)
            end
            loop.sleep(0.001)
            loop.wake(list)
            assert.same({}, list)
            for _, task in ipairs(tasks) do
                task:join()
            end
        end)
        assert.same({ 1, 2, 3 }, woken)
    end)

    it("waits for a descriptor", function()
        local fds = uv.pipe({ nonblock = true }, { nonblock = true })
        loop.run(function()
            assert.same({ nil, "timeout" }, { loop.readable(fds.read, 0.01) })
            uv.fs_write(fds.write, "x")
            assert.is_true(loop.readable(fds.read, 5))
        end)
        uv.fs_close(fds.read)
        uv.fs_close(fds.write)
    end)

    it("says deadlock instead of hanging when nothing can answer", function()
        local ok, err = pcall(loop.run, function()
            loop.await(function() end)
        end)
        assert.is_false(ok)
        assert.matches("deadlock", err)
    end)
end)
