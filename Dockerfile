# The image that answers people: python -m pipeline.image build (or make image).
#
# Layers go from what changes least to what changes most, so that whoever pulls a new answer or a mended line of code pulls
# megabytes: system, Python packages, weights, embedder, cache, code. The archives are written by pipeline/image/layers.py
# with fixed dates and owners, and what is installed here is dated back too, so that the same inputs give the same layers
# on any machine and a registry that has them is sent nothing.

# The base image, or a stage of that name: --build-arg BASE=… takes another. (Dependabot reads FROM lines alone.)
ARG BASE=official
# The same with what a network behind a proxy needs to install packages: certificates, pip's settings. None of it stays.
ARG BUILDER=${BASE}


# The index of all architectures, as Docker's official images list it. Dependabot renews it.
FROM python:3.11.16-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b AS official


FROM ${BUILDER} AS packages
COPY pyproject.toml /setup/
COPY requirements/*.txt /setup/requirements/
COPY pipeline/install.py /setup/pipeline/
ARG SOURCE_DATE_EPOCH=315532800
# What serving never opens goes: C++ headers, test programs and test suites, half of what PyTorch weighs, and the algebra
# and graphs that its compiler calculates shapes with. Bytecode is compiled once here, since a read-only root cannot keep
# it, and trusts its source whatever its date.
RUN PIP_NO_COMPILE=1 PIP_NO_CACHE_DIR=1 python3 /setup/pipeline/install.py --serving /opt/emerald \
    && cd /opt/emerald/lib/python3*/site-packages \
    && rm -rf torch/include torch/test torch/share torch/lib/*test*.so torch/lib/libbackend_with_compiler.so \
        torch/testing/_internal/py312_intrinsics.py sympy sympy-*.dist-info isympy.py mpmath mpmath-*.dist-info \
        networkx networkx-*.dist-info \
    && find torch/bin -mindepth 1 ! -name torch_shm_manager -delete \
    && find . -type d -name tests -prune -exec rm -rf {} + \
    && /opt/emerald/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/emerald/lib \
    && /opt/emerald/bin/python -c "import faiss, fastapi, tokenizers, torch, uvicorn, uvloop" \
    && find /opt/emerald -exec touch --no-dereference --date=@$SOURCE_DATE_EPOCH {} +
# Copied as a part of a folder, it keeps its own date; named as the target, it would get that of the copy.
RUN mkdir -p /packages/opt && mv /opt/emerald /packages/opt/ \
    && touch --date=@$SOURCE_DATE_EPOCH /packages/opt


# Compiled apart: a step that runs in the image itself leaves its own date on /etc, where the engine mounts files of its own.
FROM ${BUILDER} AS code
ARG SOURCE_DATE_EPOCH=315532800
ADD code.tar /code/
RUN python3 -m compileall -q --invalidation-mode unchecked-hash -s /code -p / /code/emerald/model /code/emerald/serving \
    && find /code -exec touch --no-dereference --date=@$SOURCE_DATE_EPOCH {} +


FROM ${BASE} AS serve
ARG SOURCE_DATE_EPOCH=315532800
# tini forwards signals and reaps; tcmalloc serves many threads with less waiting and less memory than the C library.
# What Debian has mended since the base was made is taken, so that building again mends what can be mended.
# What the base has and nobody needs (pip and setuptools, with their known holes, and apt's lists) is emptied, not removed: a layer dates its mark of a removed file, and nothing can date that back.
RUN touch /before \
    && apt-get update -qq \
    && DEBIAN_FRONTEND=noninteractive apt-get upgrade --with-new-pkgs -qq -y --no-install-recommends >/dev/null \
    && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends libtcmalloc-minimal4 tini >/dev/null \
    && ln -s /usr/lib/*-linux-gnu/libtcmalloc_minimal.so.4 /usr/local/lib/libtcmalloc_minimal.so.4 \
    && echo 'emerald:x:10001:10001::/nonexistent:/usr/sbin/nologin' >>/etc/passwd \
    && echo 'emerald:x:10001:' >>/etc/group \
    && find /usr/local/lib -path '*/site-packages/*' -type f -exec truncate --size=0 {} + \
    && apt-get clean \
    && rm -f /var/lib/apt/lists/*_* \
    && find /var/log /var/cache /var/lib/dpkg -type f -newer /before '(' -name '*.log*' -o -name '*-old' -o -name aux-cache ')' \
        -exec truncate --size=0 {} + \
    && find / -xdev -newer /before ! -path '/proc*' ! -path '/sys*' ! -path '/dev*' \
        -exec touch --no-dereference --date=@$SOURCE_DATE_EPOCH {} + \
    && rm /before
COPY --from=packages /packages /
# Each below 2 GB, which registries and runners take without trouble; a small model leaves all but the first empty.
ADD weights-1.tar /
ADD weights-2.tar /
ADD weights-3.tar /
ADD weights-4.tar /
ADD embedder.tar /
ADD cache.tar /
COPY --from=code /code /
ENV PATH=/opt/emerald/bin:$PATH \
    PYTHONPATH=/emerald \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    LD_PRELOAD=/usr/local/lib/libtcmalloc_minimal.so.4 \
    TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD=1000000000000 \
    EMERALD_BUILD=/emerald/build \
    HOST=0.0.0.0 \
    PORT=8000
WORKDIR /emerald
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=15s --start-period=120s --retries=3 CMD ["python", "-S", "-c", \
    "import http.client, os, sys; server = http.client.HTTPConnection('127.0.0.1', int(os.environ['PORT']), timeout=10); server.request('GET', '/health/ready'); sys.exit(server.getresponse().status != 200)"]
# 143 is a server that was asked to end, and did.
ENTRYPOINT ["tini", "-e", "143", "--"]
CMD ["python", "-m", "serving", "serve"]


FROM packages AS lambda-packages
ARG SOURCE_DATE_EPOCH=315532800
RUN PIP_NO_COMPILE=1 PIP_NO_CACHE_DIR=1 python3 -m pip --disable-pip-version-check install --quiet \
        --target /lambda/opt/lambda --requirement /setup/requirements/lambda.txt \
        --constraint /setup/requirements/linux-$(uname -m).txt \
    && python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash /lambda \
    && find /lambda -exec touch --no-dereference --date=@$SOURCE_DATE_EPOCH {} +


# The same on AWS Lambda, which has its own way to start, to ask and to end.
FROM serve AS lambda
COPY --from=lambda-packages /lambda /
ENV PYTHONPATH=/emerald:/opt/lambda
LABEL com.amazonaws.lambda.feature.snapstart="Allow"
HEALTHCHECK NONE
ENTRYPOINT []
CMD ["python", "-m", "awslambdaric", "serving.lambda_handler.handler"]
