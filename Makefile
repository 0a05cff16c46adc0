# make               the main job: installs, trains all six stages on the pun world, table, figures;
#                    again: only what is missing. With an NVIDIA GPU it takes SIZE=gpu by itself
# make SIZE=gpu      the larger model, 27 M parameters, for a consumer GPU; SIZE=cpu the small one
# make ARCH=t5       another architecture; SEED=7 another seed. Each has a folder of its own in runs/
# make TINY=1        the same in a minute, to see that everything runs (it learns nothing): the
#                    options of the size, but shorter and narrower
# make gans          the GAN's other two estimators; python evaluate.py then has them in its table
# make compare       gpt, palm and t5 with as many parameters, three seeds each: nine times make
# make real          the same stages on a pretrained model and on puns that people wrote and
#                    judged: real/Makefile
# make notebooks     executes all notebooks in place; with TINY=1 in a minute, without changing them
# make test          ruff and the whole test suite
# make bench NANOGPT=folder    beside nanoGPT, transformers, TRL, in 5 minutes
# make clean         removes runs/ and nothing else
#
# Each line below is what you would type yourself, with the paths that are its defaults.

PYTHON ?= python3
PY     := .venv/bin/python
ARCH   ?= gpt
SEED   ?= 1337
GPU    := $(if $(filter gpt,$(ARCH)),$(filter GPU,$(shell nvidia-smi -L 2>/dev/null)))
OWN    := $(if $(GPU),gpu,cpu)
SIZE   ?= $(OWN)
# What a plain make trains here is in runs/, and all else in a folder of its own, so that nothing is
# taken for what it is not.
R      ?= runs$(if $(TINY),/tiny)$(if $(filter-out $(OWN),$(SIZE)),/$(SIZE))$(OTHER)
OTHER   = $(if $(filter-out gpt-1337,$(ARCH)-$(SEED)),/$(ARCH)-$(SEED))

ifeq ($(filter cpu gpu,$(SIZE)),)
  $(error SIZE is cpu or gpu, not '$(SIZE)')
endif
ifeq ($(SIZE)$(filter gpt,$(ARCH)),gpu)
  $(error SIZE=gpu has options for ARCH=gpt alone: leave SIZE out)
endif
ifneq ($(filter all gans,$(or $(MAKECMDGOALS),all)),)
  $(info SIZE=$(SIZE)$(if $(and $(GPU),$(filter gpu,$(SIZE))), (this machine has a GPU; make \
         SIZE=cpu trains the small model)) ARCH=$(ARCH) SEED=$(SEED): into $R/)
endif

# Keeps the C library from returning memory after each step, only to ask for it again.
export MALLOC_TRIM_THRESHOLD_ := 4294967296
export MALLOC_MMAP_THRESHOLD_ := 33554432
export PYTHONUTF8 := 1

# The defaults are those of a gpt on a CPU. palm has as many parameters anyway. t5 has an encoder, a
# decoder, and an output layer, so it is narrower, and its weights need larger steps. PPO takes more
# steps with both, and pays less for KL, to get to the same place. All of it was chosen on seed 1337,
# that of palm and t5 in the large world.
ifeq ($(SIZE),gpu)
  # Where torch does not find the GPU, say with a driver that is too old, each stage says so and
  # stops: on a CPU the large model would take days.
  CUDA   := $(if $(GPU),--device cuda)
  SFT    += --tokenizer puns_large --n_layer 8 --n_embd 512 --n_head 8 --n_inner 0 \
            --batch_size 512 --grad_accum 1 --max_steps 3000 --lr 3e-3 $(CUDA)
  REWARD += --batch_size 256 --corpus_size 80000 --max_steps 300 --lr 2e-4 $(CUDA)
  DISC   += --batch_size 256 --lr 2e-4 $(CUDA)
  PPO    += --batch_size 1024 --minibatch_size 512 --lr 1e-4 $(CUDA)
  DPO    += --batch_size 256 --lr 1e-4 $(CUDA)
  GAN    += --batch_size 1024 --minibatch_size 512 --d_batch_size 256 --lr 1e-4 $(CUDA)
  EVAL   += --samples 10000
else ifeq ($(ARCH),palm)
  PPO    += --max_steps 100 --kl_coef 0.2
  GAN    += --d_lr 4e-4
else ifeq ($(ARCH),t5)
  SFT    += --n_embd 108 --n_inner 108 --lr 2e-2
  REWARD += --lr 1e-3
  PPO    += --max_steps 100 --lr 2.5e-4 --kl_coef 0.2
  DPO    += --lr 2.4e-4
  GAN    += --lr 3e-4 --d_lr 4e-4 --kl_coef 0.05
endif

# Of an option that stands twice, the last one counts. Only lengths and widths stand here: batches,
# rates, and all else are those of the size, so that TINY=1 finds what is wrong with them.
ifdef TINY
  SFT    += --corpus_size 2000 --max_steps 6 --eval_interval 3 \
            --n_layer 1 --n_embd 32 --n_head 2 --n_inner 0
  REWARD += --corpus_size 600 --max_steps 4 --eval_interval 2
  DISC   += --corpus_size 600 --max_steps 4 --eval_interval 2
  PPO    += --max_steps 2 --max_new_tokens 8 --sample_interval 1
  DPO    += --corpus_size 600 --max_steps 4 --eval_interval 2
  GAN    += --corpus_size 600 --max_steps 2 --max_new_tokens 8 --sample_interval 1
  EVAL   += --samples 32 --best_of 2
endif

.PHONY: all gans compare real notebooks test ruff bench clean
all: $R/report.json

$R/sft/ckpt.pt: | .venv/ready
	$(PY) sft.py --arch $(ARCH) --seed $(SEED) --out_dir $R/sft $(SFT)
$R/reward_model/ckpt.pt: $R/sft/ckpt.pt
	$(PY) reward_model.py --seed $(SEED) --out_dir $R/reward_model --init $R/sft/ckpt.pt $(REWARD)
$R/discriminator/ckpt.pt: $R/sft/ckpt.pt
	$(PY) discriminator.py --seed $(SEED) --out_dir $R/discriminator --init $R/sft/ckpt.pt $(DISC)
$R/ppo/ckpt.pt: $R/sft/ckpt.pt $R/reward_model/ckpt.pt
	$(PY) ppo.py --seed $(SEED) --out_dir $R/ppo --init $R/sft/ckpt.pt \
	    --reward $R/reward_model/ckpt.pt $(PPO)
$R/dpo/ckpt.pt: $R/sft/ckpt.pt
	$(PY) dpo.py --seed $(SEED) --out_dir $R/dpo --init $R/sft/ckpt.pt $(DPO)
$R/gan/ckpt.pt: $R/sft/ckpt.pt $R/discriminator/ckpt.pt
	$(PY) gan.py --seed $(SEED) --out_dir $R/gan --init $R/sft/ckpt.pt \
	    --disc $R/discriminator/ckpt.pt $(GAN)
$R/report.json: $R/ppo/ckpt.pt $R/dpo/ckpt.pt $R/gan/ckpt.pt
	$(PY) evaluate.py --out_dir $R --reference $R/sft/ckpt.pt \
	    --reward $R/reward_model/ckpt.pt $(EVAL)
	@echo 'Now let them write:  $(PY) sample.py "a banker" --runs $R'

# the other two gradients of the GAN, for comparison
$R/gan_%/ckpt.pt: $R/sft/ckpt.pt $R/discriminator/ckpt.pt
	$(PY) gan.py --seed $(SEED) --estimator $* --out_dir $R/gan_$* --init $R/sft/ckpt.pt \
	    --disc $R/discriminator/ckpt.pt $(GAN)
$R/discriminator_states/ckpt.pt: $R/sft/ckpt.pt
	$(PY) discriminator.py --seed $(SEED) --reads states --lstm --out_dir $R/discriminator_states \
	    --init $R/sft/ckpt.pt $(DISC)
$R/gan_hidden/ckpt.pt: $R/sft/ckpt.pt $R/discriminator_states/ckpt.pt
	$(PY) gan.py --seed $(SEED) --estimator hidden --out_dir $R/gan_hidden --init $R/sft/ckpt.pt \
	    --disc $R/discriminator_states/ckpt.pt $(GAN)
gans: $R/gan_gumbel/ckpt.pt $R/gan_hidden/ckpt.pt

# architectures side by side: a whole run in $R/compare/<arch>-<seed> each
SEEDS := 1337 1338 1339
RUNS  := $(foreach arch,gpt palm t5,$(SEEDS:%=$R/compare/$(arch)-%/report.json))
$(RUNS): | .venv/ready
	$(MAKE) SIZE=cpu R=$(@D) $(join ARCH= SEED=,$(subst -, ,$(notdir $(@D))))
compare: $(RUNS)
	$(PY) evaluate.py --compare $R/compare

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
.venv/ready-test: .venv/ready requirements-test.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

real: .venv/ready
	$(MAKE) -f real/Makefile

notebooks: .venv/ready
	TINY=$(TINY) $(PY) tests/run_notebooks.py

ruff: .venv/ready-test
	$(PY) -m ruff check .
test: ruff
	$(PY) -m pytest -q tests

bench: .venv/ready-test
	$(PY) tests/bench.py $(NANOGPT)

clean:
	rm -rf runs
