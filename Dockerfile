# syntax=docker/dockerfile:1
# One image for every service: `python -m router`, `python -m prefill_svc`, `python -m decode_svc`.

FROM python:3.11-slim-bookworm AS packages
ARG PIP_OPTIONS=""
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /opt/legato
# What an editable install reads, and no more: a change of our code does not install torch again.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY legato/__init__.py legato/__init__.py
RUN pip install --no-cache-dir --disable-pip-version-check $PIP_OPTIONS --constraint constraints.txt --editable '.[serve]'

FROM python:3.11-slim-bookworm
# The CPU kernels are compiled for the machine they run on, once, at first start.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home legato && install --directory --owner=legato --group=legato /home/legato/.cache
COPY --from=packages /opt/venv /opt/venv
COPY . /opt/legato
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /opt/legato
USER legato
CMD ["legato", "--help"]
