#!/bin/bash
# collect.sh CODE: what CODE/runs holds goes into ./tutorials/results (run it in the project's root)
set -e
R=tutorials/results; O=$1/runs
for n in seed0 seed1 seed2 seed0-no-accuracy; do
  mkdir -p $R/$n; cp $O/tiny-$n/{settings.json,summary.json,metrics.jsonl,curves.png} $R/$n/
  [ $n = seed0-no-accuracy ] || cp $O/tiny-$n/answers.jsonl $R/$n/
done
mkdir -p $R/seed0/adapter; cp $O/tiny-seed0/adapter/{adapter_config.json,adapter_model.safetensors} $R/seed0/adapter/; cp $O/tiny-seed0/sheet-test.png $R/seed0/
sed -i 's#"base_model_name_or_path": .*#"base_model_name_or_path": "samr1_mini/tiny/policy",#' $R/seed0/adapter/adapter_config.json
python3 - $O $R <<P
import json, sys
for name in ("blank", "mirror"):
    found = json.load(open(f"{sys.argv[1]}/{name}/results.json"))["summary"]
    json.dump(found, open(f"{sys.argv[2]}/seed0/{name}.json", "w"), indent=1)
P
cp $O/learning.gif $O/phases.png $R/; chmod -R u+rw,go+r $R; grep -rln "/tmp\|/work" $R || true
