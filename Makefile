# SPDX-License-Identifier: Apache-2.0
#
# Two commands do everything on a fresh Debian 12 machine:
#   make demo   a real image from a real registry, run in a real KVM guest
#   make test   every specification; ends in `N passed, N failed`
# `make` alone builds ./sm and build/. Sources are found by folder, so a new
# file needs no line here:
#   core/ core/dev/ core/kvm|core/fake   the VMM, libc and pthread only
#   core/lua_*.c                         its Lua module, sm.core
#   core/image/                          the image module, sm.image_core
#   core/guest/                          the guest's PID 1, static
#   core/net/                            sm-net, the network's own process
# SAN=asan|tsan builds a sanitized copy below build/$(SAN)/; asan has UBSan with it.

ARCH    ?= $(shell uname -m)
CC      ?= gcc
B       := build$(if $(SAN),/$(SAN))
PREFIX  ?= /usr/local
# Where stock Lua 5.4 looks; the modules find the other two from there.
BINDIR     ?= $(PREFIX)/bin
LUADIR     ?= $(PREFIX)/share/lua/5.4
CMODDIR    ?= $(PREFIX)/lib/lua/5.4
LIBEXECDIR ?= $(PREFIX)/libexec/sm

SANFLAGS_asan := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
SANFLAGS_tsan := -fsanitize=thread
SANFLAGS := $(SANFLAGS_$(SAN))

WARN    := -Wall -Wextra -Wshadow -Wimplicit-fallthrough -Wmissing-prototypes \
           -Wvla -Wpointer-arith -Wstrict-prototypes $(if $(WERROR),-Werror)
CFLAGS  ?= -O2 -g
ALL_CFLAGS = -std=c11 -D_GNU_SOURCE -D_FILE_OFFSET_BITS=64 -fPIC -pthread \
           -fvisibility=hidden $(WARN) -Icore $(CFLAGS) $(SANFLAGS) -MMD -MP
LUA_CFLAGS := $(shell pkg-config --cflags lua5.4 2>/dev/null || echo -I/usr/include/lua5.4)
LUA_LIBS   := $(shell pkg-config --libs lua5.4 2>/dev/null || echo -llua5.4)
IMAGE_LIBS := -lcurl -larchive -lzstd -lisal -lz -lcrypto
AGENT_CC   ?= musl-gcc
LUA        ?= lua5.4

core_src  := $(filter-out core/main.c core/worker.c core/lua_%.c,$(wildcard core/*.c core/dev/*.c))
kvm_src   := $(core_src) $(wildcard core/kvm/*.c)
fake_src  := $(core_src) $(wildcard core/fake/*.c)
lua_src   := $(wildcard core/lua_*.c)
image_src := $(wildcard core/image/*.c)
# What of the network needs neither libslirp nor a process.
net_src   := $(filter-out core/net/main.c core/net/control.c core/net/user.c,$(wildcard core/net/*.c))
guest_src := $(wildcard core/guest/*.c)

obj = $(patsubst %.c,$(B)/obj/%.o,$(1))

.PHONY: docs all clean demo test soak bench kernel fuzz install check-format
all: sm $(B)/sm/core.so $(B)/sm/image_core.so $(B)/sm-worker $(B)/sm-net $(B)/guest/init build/luac/.stamp

-include $(shell find $(B)/obj $(B)/unit $(B)/kvmtest build/fuzz -name '*.d' 2>/dev/null)

$(B)/obj/core/lua_%.o $(B)/obj/core/main.o $(B)/obj/core/image/%.o: ALL_CFLAGS += $(LUA_CFLAGS)
$(B)/obj/%.o: %.c
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) -c -o $@ $<

$(B)/libsmcore.a: $(call obj,$(kvm_src))
	rm -f $@ && $(AR) rcs $@ $^
$(B)/libsmfake.a: $(call obj,$(fake_src))
	rm -f $@ && $(AR) rcs $@ $^

$(B)/sm/core.so: $(call obj,$(lua_src)) $(B)/libsmcore.a
	@mkdir -p $(@D)
	$(CC) -shared -pthread $(SANFLAGS) $(LDFLAGS) -o $@ $^
$(B)/fake/sm/core.so: $(call obj,$(lua_src)) $(B)/libsmfake.a
	@mkdir -p $(@D)
	$(CC) -shared -pthread $(SANFLAGS) $(LDFLAGS) -o $@ $^
$(B)/sm/image_core.so: $(call obj,$(image_src))
	@mkdir -p $(@D)
	$(CC) -shared -pthread $(SANFLAGS) $(LDFLAGS) -o $@ $^ $(IMAGE_LIBS)

$(B)/sm-worker: $(call obj,core/worker.c) $(B)/libsmcore.a
	$(CC) -pthread $(SANFLAGS) $(LDFLAGS) -o $@ $^
$(B)/fake/sm-worker: $(call obj,core/worker.c) $(B)/libsmfake.a
	@mkdir -p $(@D)
	$(CC) -pthread $(SANFLAGS) $(LDFLAGS) -o $@ $^

# The Lua modules compiled, which `sm` takes for their sources as long as they are the same.
build/luac/.stamp: scripts/compile-lua $(shell find lua -name '*.lua')
	$(LUA) scripts/compile-lua lua build/luac $(CURDIR)/lua
	@touch $@

# libslirp by its shared object alone: its .pc file asks for glib's headers.
net_bin_src := $(wildcard core/net/*.c) core/msg.c core/io.c core/confine.c core/msg_socket.c core/tap.c
$(B)/sm-net: $(call obj,$(net_bin_src))
	$(CC) -pthread $(SANFLAGS) $(LDFLAGS) -o $@ $^ -lslirp

# The guest's PID 1: static, small, no sanitizer; it shares only proto.h.
$(B)/guest/init: $(guest_src) $(wildcard core/guest/*.h)
	@mkdir -p $(@D)
	$(AGENT_CC) -std=c11 -D_GNU_SOURCE -static -Os -g0 $(WARN) -o $@ $(guest_src)
	strip $@
# The same as an ordinary program of this machine, which sanitizers can watch.
$(B)/native/guest/init: $(guest_src) $(wildcard core/guest/*.h)
	@mkdir -p $(@D)
	$(CC) -std=c11 -D_GNU_SOURCE -O1 -g $(WARN) $(SANFLAGS) -o $@ $(guest_src)

# Programs that specs bring into guests: what works while it is saved, and sends what it likes.
$(B)/guest/load: spec/soak/load.c
$(B)/guest/rawsend: spec/kvm/rawsend.c
$(B)/guest/load $(B)/guest/rawsend:
	@mkdir -p $(@D)
	$(AGENT_CC) -std=c11 -D_GNU_SOURCE -static -O1 -g0 $(WARN) -o $@ $<

sm: $(call obj,core/main.c)
	$(CC) -pthread $(LDFLAGS) -o $@ $^ $(LUA_LIBS)

# C tests: spec/unit/<name>_test.c, one program each, no VM.
unit_names := $(patsubst spec/unit/%_test.c,%,$(wildcard spec/unit/*_test.c))
unit_bins  := $(addprefix $(B)/unit/,$(unit_names))
.PHONY: unit
unit: $(unit_bins)
$(B)/unit/%: spec/unit/%_test.c spec/unit/test.h $(B)/libsmfake.a $(B)/libsmimage.a $(B)/libsmnet.a
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) $(LUA_CFLAGS) -Icore/image -Icore/guest -Ispec/unit -o $@ $< \
	    $(B)/libsmnet.a $(B)/libsmfake.a $(B)/libsmimage.a $(IMAGE_LIBS)
$(B)/libsmnet.a: $(call obj,$(net_src))
	rm -f $@ && $(AR) rcs $@ $^
$(B)/libsmimage.a: $(call obj,$(filter-out core/image/lua_%.c,$(image_src)))
	rm -f $@ && $(AR) rcs $@ $^

# C tests on a real /dev/kvm: spec/kvm/<name>_test.c, one program each.
kvmtest_bins := $(patsubst spec/kvm/%_test.c,$(B)/kvmtest/%,$(wildcard spec/kvm/*_test.c))
.PHONY: kvmtest
kvmtest: $(kvmtest_bins)
$(B)/kvmtest/%: spec/kvm/%_test.c spec/unit/test.h $(wildcard spec/kvm/*.h) $(B)/libsmcore.a
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) -Ispec/unit -Ispec/kvm -o $@ $< $(B)/libsmcore.a

# Fuzz targets: spec/fuzz/<name>_fuzz.c, libFuzzer; `make fuzz` builds them,
# scripts/fuzz runs them.
fuzz_names := $(patsubst spec/fuzz/%_fuzz.c,%,$(wildcard spec/fuzz/*_fuzz.c))
fuzz_bins  := $(addprefix build/fuzz/,$(fuzz_names))
fuzz_lib   := $(fake_src) $(filter-out core/image/lua_%.c,$(image_src)) $(net_src)
fuzz: $(fuzz_bins)
build/fuzz/obj/%.o: %.c
	@mkdir -p $(@D)
	clang -std=c11 -D_GNU_SOURCE -D_FILE_OFFSET_BITS=64 -fPIC -pthread -Icore -O1 -g \
	    -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=undefined -MMD -MP -c -o $@ $<
build/fuzz/libsm.a: $(patsubst %.c,build/fuzz/obj/%.o,$(fuzz_lib))
	rm -f $@ && ar rcs $@ $^
build/fuzz/%: spec/fuzz/%_fuzz.c build/fuzz/libsm.a
	clang -std=c11 -D_GNU_SOURCE -D_FILE_OFFSET_BITS=64 -pthread -Icore -Icore/image -Icore/guest -Ispec/unit -O1 -g \
	    -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined -MMD -MP -o $@ $< build/fuzz/libsm.a $(IMAGE_LIBS)

kernel:
	scripts/kernel
demo:
	scripts/demo
test:
	scripts/test
soak:
	scripts/soak
bench:
	scripts/bench

# make install PREFIX=/usr/local DESTDIR=
install: all
	install -d $(DESTDIR)$(BINDIR) $(DESTDIR)$(CMODDIR)/sm $(DESTDIR)$(LIBEXECDIR)
	install -m 755 sm $(DESTDIR)$(BINDIR)/sm
	install -m 644 build/sm/core.so build/sm/image_core.so $(DESTDIR)$(CMODDIR)/sm/
	install -m 755 build/sm-worker build/sm-net build/guest/init $(DESTDIR)$(LIBEXECDIR)/
	cd lua && find . -name '*.lua' -exec install -D -p -m 644 {} $(DESTDIR)$(LUADIR)/{} ';'
	$(LUA) scripts/compile-lua lua $(DESTDIR)$(LIBEXECDIR)/luac $(BINDIR)/../share/lua/5.4

# The manual (Markdown and man page) and definitions for editors, build/docs/.
docs: all
	@mkdir -p build/docs/sm
	LUA_PATH='lua/?.lua;;' LUA_CPATH='build/?.so;;' lua5.4 scripts/docs build/docs
	cp lua/sm/core_api.lua build/docs/sm/

# A host program that embeds Lua and, in it, this: see spec/host/host.c.
$(B)/host: spec/host/host.c
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) $(LUA_CFLAGS) -o $@ $< $(LUA_LIBS)

clean:
	rm -rf build sm
